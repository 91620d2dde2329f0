"""Stub workers that speak the real control protocol and compute nothing.

    python -m kvferry.benchmarks.overhead.workers CONTROL_PORT --model-len N --letters IDS --records FILE ...

One prefill worker and some decode workers, each with a session of its own with the router:
    ReserveKV ─> Grant         PrefillTask ─> FirstToken, TransferReport, and the decode worker says HandoffDone
    step ─> StepTokens: the next token of every stream of that worker, in one message, as a real one sends it
Ends with SIGTERM, and writes when each token left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from itertools import count
from pathlib import Path
from time import perf_counter

import uvloop

from kvferry import __version__
from kvferry.benchmarks.overhead.steps import MODEL, Records, Steps, StubStream
from kvferry.common.config import environment
from kvferry.common.errors import WorkerLost
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import FinishReason, RequestSpec, SampledToken
from kvferry.wire.address import Address
from kvferry.wire.channel import Channel, connect
from kvferry.wire.codec import Decoder, RouterToWorker
from kvferry.wire.credentials import SharedSecret, read_secrets
from kvferry.wire.frames import max_frame_bytes
from kvferry.wire.grants import GrantId, GrantInfo, RegionInfo
from kvferry.wire.results import ChoiceTokens, FirstToken, Grant, HandoffDone, RequestTokens, StepTokens
from kvferry.wire.tasks import Abort, LocalTask, PrefillTask, ReserveKV
from kvferry.wire.workers import TransferReport, WorkerHello, WorkerStatus

_SPEC = KVCacheSpec(model=MODEL, num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
_NUM_BLOCKS = 1 << 20
_MAX_SEQS = 1 << 12
_BEAT_S = 0.1
_PAGE_BYTES = 1 << 16

_decoder: Decoder[RouterToWorker] = Decoder(RouterToWorker)


class Fleet:
    """What the stub workers of one process share: the letters that they answer with, and what they hold."""

    def __init__(self, letters: tuple[int, ...], records: Records) -> None:
        self.records = records
        self.reserved: dict[str, tuple[DecodeStub, StubStream]] = {}  # granted, not prefilled
        self._tokens = [SampledToken(letter) for letter in letters]

    def token(self, index: int) -> SampledToken:
        return self._tokens[index % len(self._tokens)]


class Stub:
    """One worker's session."""

    def __init__(self, fleet: Fleet, channel: Channel) -> None:
        self.fleet = fleet
        self.channel = channel
        self._seq = count(1)

    async def work(self) -> None:
        """Until the router is gone."""
        beats = asyncio.create_task(self._beat())
        with contextlib.suppress(WorkerLost):
            while True:
                frame = await self.channel.recv()
                received_s = perf_counter()
                self.on_message(_decoder.decode(frame), received_s)
        beats.cancel()

    def on_message(self, message: RouterToWorker, received_s: float) -> None:
        raise NotImplementedError

    def num_running(self) -> int:
        return 0

    async def _beat(self) -> None:
        while True:
            seq = next(self._seq)
            self.channel.send(
                WorkerStatus(
                    seq=seq,
                    state="ready",
                    num_running=self.num_running(),
                    num_waiting=0,
                    waiting_tokens=0,
                    num_free_blocks=_NUM_BLOCKS,
                    num_cached_blocks=0,
                    num_granted_blocks=0,
                    num_quarantined_blocks=0,
                    num_blocks=_NUM_BLOCKS,
                    steps=seq,
                    busy_for_s=0.0,
                    step_s=0.001,
                    step_tokens=512,
                )
            )
            await asyncio.sleep(_BEAT_S)


class DecodeStub(Stub):
    """Grants at once, and steps all of its streams together."""

    def __init__(self, fleet: Fleet, channel: Channel, worker_id: str, step_s: float, phase: float) -> None:
        super().__init__(fleet, channel)
        self.steps = Steps(step_s, self._emit, phase=phase)
        self._worker_id = worker_id
        self._attempts: dict[str, int] = {}
        self._epochs = count(1)

    def num_running(self) -> int:
        return len(self.steps)

    def on_message(self, message: RouterToWorker, received_s: float) -> None:
        match message:
            case ReserveKV(spec=spec):
                stream = self.fleet.records.open(spec.request_id, spec.sampling.max_tokens)
                self.fleet.reserved[spec.request_id] = (self, stream)
                self._attempts[spec.request_id] = spec.attempt
                self.channel.send(Grant(request_id=spec.request_id, attempt=spec.attempt, grant=self._grant(spec)))
                stream.own_s += perf_counter() - received_s
            case LocalTask(spec=spec):
                self._attempts[spec.request_id] = spec.attempt
                self.steps.add(self.fleet.records.open(spec.request_id, spec.sampling.max_tokens))
            case Abort(request_id=name):
                self.steps.drop(name)
                self._attempts.pop(name, None)
            case _:
                pass

    def adopt(self, stream: StubStream, num_bytes: int) -> None:
        """The prompt's KV has arrived, with the first token."""
        attempt = self._attempts[stream.name]
        self.channel.send(HandoffDone(request_id=stream.name, attempt=attempt, num_bytes=num_bytes))
        self.steps.add(stream)

    def _emit(self, streams: list[StubStream]) -> None:
        now_s = perf_counter()
        updates = tuple([self._update(stream, now_s) for stream in streams])
        self.channel.send(StepTokens(updates=updates))

    def _update(self, stream: StubStream, now_s: float) -> RequestTokens:
        index = len(stream.emitted_s)
        stream.emitted_s.append(now_s)
        finish = FinishReason.LENGTH if stream.is_over else None
        tokens = [ChoiceTokens(0, index, (self.fleet.token(index),), finish)]
        if index == 1:  # what came with the KV is told again
            tokens.insert(0, ChoiceTokens(0, 0, (self.fleet.token(0),)))
        return RequestTokens(stream.name, self._attempts[stream.name], tuple(tokens))

    def _grant(self, spec: RequestSpec) -> GrantInfo:
        epoch = next(self._epochs)
        num_blocks = _SPEC.num_blocks_for(spec.num_prompt_tokens)
        region = RegionInfo(
            rank=0,
            tp_size=1,
            agent=f"{self._worker_id}.1.1.0",
            generation=1,
            agent_metadata=b"\0" * 512,
            base_addr=1 << 40,
            num_blocks=_NUM_BLOCKS,
            page_bytes=_PAGE_BYTES,
            device="VRAM",
            device_id=0,
            transport="nixl",
        )
        return GrantInfo(
            grant_id=GrantId(self._worker_id, 1, epoch),
            spec=_SPEC,
            kv_address="127.0.0.1:1",
            block_ids=tuple(range(epoch, epoch + num_blocks)),
            num_tokens=spec.num_prompt_tokens,
            num_computed_tokens=0,
            ranks=(region,),
            open_within_s=2.0,
            mac=b"\0" * 32,
        )


class PrefillStub(Stub):
    """Every prompt is computed and shipped at once."""

    def on_message(self, message: RouterToWorker, received_s: float) -> None:
        if not isinstance(message, PrefillTask):
            return
        spec = message.spec
        decode, stream = self.fleet.reserved.pop(spec.request_id)
        finish = FinishReason.LENGTH if stream.num_tokens == 1 else None
        first = FirstToken(
            request_id=spec.request_id,
            attempt=spec.attempt,
            choices=(ChoiceTokens(0, 0, (self.fleet.token(0),), finish),),
            num_cached_tokens=0,
            prefill_s=0.0,
            queue_s=0.0,
        )
        now_s = perf_counter()
        stream.own_s += now_s - received_s
        stream.emitted_s.append(now_s)
        self.channel.send(first)
        num_blocks = len(message.grant.block_ids)
        report = TransferReport(
            request_id=spec.request_id,
            attempt=spec.attempt,
            decode_worker=message.grant.grant_id.worker_id,
            num_bytes=num_blocks * _PAGE_BYTES,
            num_blocks=num_blocks,
            transfer_s=0.001,
            exposed_s=0.0,
            clean=True,
        )
        self.channel.send(report)
        decode.adopt(stream, num_blocks * _PAGE_BYTES)


async def _join(control: Address, worker_id: str, role: str, model_len: int) -> Channel:
    secret = SharedSecret(*read_secrets(None, environment()))
    channel = await connect(control, worker_id, secret=secret, max_frame_bytes=max_frame_bytes(model_len))
    channel.send(
        WorkerHello(
            worker_id=worker_id,
            role=role,
            incarnation=1,
            version=__version__,
            model=MODEL,
            spec=_SPEC,
            tp_size=1,
            num_blocks=_NUM_BLOCKS,
            max_model_len=model_len,
            max_num_seqs=_MAX_SEQS,
            max_num_batched_tokens=1 << 14,
            kv_address="127.0.0.1:1",
            pid=os.getpid(),
            transport="nixl",
        )
    )
    return channel


async def _serve(flags: argparse.Namespace) -> None:
    records = Records()
    fleet = Fleet(tuple(map(int, flags.letters.split(","))), records)
    control = Address("127.0.0.1", flags.control_port)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    works = []
    for number in range(flags.decode_workers):
        channel = await _join(control, f"d-{number}", "decode", flags.model_len)
        decode = DecodeStub(fleet, channel, f"d-{number}", flags.step_ms / 1e3, number / flags.decode_workers)
        works += [asyncio.ensure_future(decode.work()), asyncio.ensure_future(decode.steps.run())]
    prefill = PrefillStub(fleet, await _join(control, "p-0", "prefill", flags.model_len))
    works.append(asyncio.ensure_future(prefill.work()))
    await ended.wait()
    for work in works:
        work.cancel()
    records.write(flags.records)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("control_port", type=int)
    parser.add_argument("--model-len", type=int, required=True)
    parser.add_argument("--letters", required=True, help="token ids, each of one letter")
    parser.add_argument("--decode-workers", type=int, default=1)
    parser.add_argument("--step-ms", type=float, default=0.0, help="0: at once")
    parser.add_argument("--records", type=Path, required=True)
    uvloop.run(_serve(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
