"""Frames against the decoders and against a live control server: only one kind of error, and no growth.

    decoders   every frame through every decoder; anything but a message or a ProtocolError is a failure
    server     a process with the router's control server and dispatcher. A session says hello like a worker, sends
               frames that decode and make no sense, then one that does not decode, which must end it. Afterwards a
               sound worker still gets in, and the log tells of no exception

Memory is read after a tenth of the frames (every path has run by then) and at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from kvferry.benchmarks.fuzz.corpus import DECODERS, FrameSource, attack_frames
from kvferry.benchmarks.fuzz.messages import hello, status, valid_messages
from kvferry.benchmarks.fuzz.target import MODEL, Target, control_server
from kvferry.common.errors import ProtocolError, WorkerLost
from kvferry.wire.address import Address
from kvferry.wire.channel import Channel, connect
from kvferry.wire.codec import Decoder, WorkerToRouter, encode
from kvferry.wire.fields import Message
from kvferry.wire.workers import WorkerHello

_SETTLE_SHARE = 10  # a tenth of the frames comes before the first look at memory
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PLAUSIBLE_FRAMES = 30  # at most, in one session
_END_S = 30.0
_MAX_REPORTED = 5


@dataclass(slots=True)
class FuzzResult:
    """What one target did."""

    name: str
    num_sent: int = 0
    num_accepted: int = 0
    failures: list[str] = field(default_factory=list)
    rss_before_bytes: int = 0
    rss_after_bytes: int = 0
    rss_samples_bytes: list[int] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def growth(self) -> float:
        """Share by which resident memory grew."""
        return self.rss_after_bytes / self.rss_before_bytes - 1 if self.rss_before_bytes else 0.0

    def fail(self, what: str) -> None:
        self.outcomes["failed"] += 1
        if len(self.failures) < _MAX_REPORTED:
            self.failures.append(what[:500])


def fuzz_decoders(num_frames: int, seed: int) -> FuzzResult:
    result = FuzzResult("decoders")
    for number, frame in enumerate(itertools.islice(_frames(seed), num_frames)):
        if number == num_frames // _SETTLE_SHARE:
            result.rss_before_bytes = _own_rss_bytes()
        result.num_sent += 1
        for decoder in DECODERS:
            try:
                decoder.decode(frame)
                result.num_accepted += 1
            except ProtocolError:
                pass
            except BaseException as error:
                result.fail(f"{type(error).__name__}: {error}; frame {frame[:64].hex()}")
                if isinstance(error, KeyboardInterrupt):
                    raise
    result.rss_after_bytes = _own_rss_bytes()
    return result


def fuzz_server(num_frames: int, seed: int, log_dir: Path) -> FuzzResult:
    result = FuzzResult("control server")
    with control_server(log_dir) as target:
        asyncio.run(_attack(target, num_frames, seed, result))
        for line in target.complaints():
            result.fail(f"its log: {line}")
        if not target.is_alive:
            result.fail(f"it ended: {target.process.log_tail()}")
    return result


async def _attack(target: Target, num_frames: int, seed: int, result: FuzzResult) -> None:
    bad_frames = filter(_is_refused, _frames(seed + 1))
    source, rng = FrameSource(seed + 2), random.Random(seed)
    while result.num_sent < num_frames:
        if not result.rss_before_bytes and result.num_sent * _SETTLE_SHARE >= num_frames:
            result.rss_before_bytes = target.rss_bytes
        messages = rng.choices(_FROM_WORKERS, k=rng.randrange(_PLAUSIBLE_FRAMES))
        frames = [*map(source.plausible, messages), next(bad_frames)]
        greeting = source.plausible(_sound_hello()) if rng.random() < 0.3 else encode(_sound_hello())
        try:
            await _session(target.address, greeting, frames, result)
        except (WorkerLost, ProtocolError) as error:
            result.fail(f"no session: {error}")
            if not target.is_alive:
                return
    result.rss_after_bytes = target.rss_bytes
    await _check_open(target.address, result)


async def _session(address: Address, greeting: bytes, frames: Sequence[bytes], result: FuzzResult) -> None:
    """The last of the frames ends it, if none before did."""
    channel = await connect(address, "d-0")
    ended = asyncio.create_task(_read_until_end(channel))
    try:
        for frame in (greeting, *frames):
            write_raw(channel, frame)
            result.num_sent += 1
            result.num_accepted += not _is_refused(frame)
        await asyncio.wait_for(ended, _END_S)
        result.outcomes["sessions"] += 1
    except TimeoutError:
        result.fail("a session that sent a broken frame was not ended")
    finally:
        ended.cancel()
        channel.abort()


_worker_frames: Decoder[Message] = Decoder(WorkerToRouter)
_FROM_WORKERS = [message for message in valid_messages() if isinstance(message, WorkerToRouter)]


def _is_refused(frame: bytes) -> bool:
    try:
        _worker_frames.decode(frame)
    except ProtocolError:
        return True
    return False


async def _join(address: Address) -> Channel:
    channel = await connect(address, "d-0")
    channel.send(_sound_hello())
    channel.send(status())
    return channel


def _sound_hello() -> WorkerHello:
    return msgspec.structs.replace(hello(), model=MODEL)


async def _read_until_end(channel: Channel) -> None:
    with contextlib.suppress(WorkerLost, ProtocolError):
        while True:
            await channel.recv()


async def _check_open(address: Address, result: FuzzResult) -> None:
    """A worker that behaves is taken, and stays."""
    channel = await _join(address)
    try:
        async with asyncio.timeout(1.0):
            await _read_until_end(channel)
        result.fail("a sound worker's session was ended")
    except TimeoutError:
        result.outcomes["sound worker stays"] += 1
    finally:
        channel.abort()


def write_raw(channel: Channel, frame: bytes) -> None:
    """A frame that our own encoder would not make."""
    writer = channel._writer
    if not writer.is_closing():
        writer.write(len(frame).to_bytes(4, "big") + frame)


def _frames(seed: int) -> Iterator[bytes]:
    return itertools.chain(attack_frames().values(), FrameSource(seed), (encode(status()),))


def _own_rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
