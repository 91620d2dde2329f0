"""The servers that are attacked, each a process of its own, and the worker that makes them answer.

    python -m kvferry.benchmarks.fuzz.target PORT            the control server with its dispatcher, for frames
    python -m kvferry.router                                 the real router, for bodies and clients
    python -m kvferry.benchmarks.fuzz.target PORT LENGTH     its worker, which joins it at PORT

The worker speaks the real protocol over the real socket, from a process of its own, and answers with tokens that it
makes up: short answers at once, long ones at the pace of a step. What is measured is the router.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvferry import __version__
from kvferry.benchmarks.fuzz.messages import hello, status
from kvferry.common.clock import SystemClock
from kvferry.common.config import API_KEY_VARIABLE, SECRET_VARIABLE
from kvferry.common.errors import WorkerLost
from kvferry.common.logs import configure_logging
from kvferry.common.request import FinishReason, RequestSpec, SampledToken
from kvferry.common.router_config import RouterConfig
from kvferry.router.dispatch.control import ControlServer
from kvferry.router.dispatch.dispatcher import Dispatcher
from kvferry.router.dispatch.worker_group import Expected, WorkerGroup
from kvferry.router.metrics.metrics import RouterMetrics
from kvferry.router.placement.least_loaded import LeastLoaded
from kvferry.tools.load.server_process import ServerProcess, free_port, running
from kvferry.wire.address import Address
from kvferry.wire.channel import Channel, connect
from kvferry.wire.codec import Decoder, RouterToWorker
from kvferry.wire.credentials import SharedSecret
from kvferry.wire.frames import max_frame_bytes
from kvferry.wire.results import ChoiceTokens, Embedding, PromptLogprobs, RequestTokens, StepTokens, in_pieces
from kvferry.wire.tasks import Abort, EmbedTask, LocalTask

API_KEY = "fuzz-key"
VICTIM_KEY = "victim-key"  # of a tenant that attacks nobody
MODEL = "fuzz"
SECRET = "fuzz-secret-of-the-fabric"
_START_S = 60.0
_BEAT_S = 0.5
_FREE_TOKENS = 4  # a request gets so many tokens, or as many as it insists on
_STEP_S = 0.01  # between two tokens of a longer one
_MODEL_LEN = 2048
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True, frozen=True)
class Target:
    """A server under attack."""

    process: ServerProcess
    address: Address

    @property
    def rss_bytes(self) -> int:
        """Resident memory; 0: the process is gone."""
        try:
            fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        except OSError:
            return 0
        return int(fields[1]) * _PAGE_BYTES

    @property
    def is_alive(self) -> bool:
        return self.process.wait(0) is None

    def complaints(self) -> list[str]:
        """Lines of its log that tell of an exception that nobody expected."""
        lines = self.process.log_path.read_text(errors="replace").splitlines()
        signs = ("Traceback", "request_error", "Unhandled exception", "never retrieved", "Exception in")
        return [line for line in lines if any(sign in line for sign in signs)]


@contextlib.contextmanager
def control_server(log_dir: Path) -> Iterator[Target]:
    """A control server with the router's dispatcher, without a secret, on the loopback."""
    port = free_port()
    command = [sys.executable, "-m", "kvferry.benchmarks.fuzz.target", str(port)]
    with running("control", command, log_dir) as process:
        address = Address("127.0.0.1", port)
        _await_listener(process, address)
        yield Target(process, address)


@contextlib.contextmanager
def router(model_dir: Path, log_dir: Path, **settings: object) -> Iterator[Target]:
    """The router process, with one API key. `settings` are RouterConfig's."""
    http, control = free_port(), free_port()
    config = RouterConfig.model_validate(
        {
            "port": http,
            "control_port": control,
            "model_dir": model_dir,
            "served_model_name": MODEL,
            "expect_prefill": False,
            "log_level": "warning",
            **settings,
        }
    )
    command = [sys.executable, "-m", "kvferry.router", "--config-json", config.model_dump_json()]
    env = {API_KEY_VARIABLE: f"{API_KEY},{VICTIM_KEY}", SECRET_VARIABLE: SECRET}
    length = str(config.max_model_len or _MODEL_LEN)
    worker = [sys.executable, "-m", "kvferry.benchmarks.fuzz.target", str(control), length]
    with running("router", command, log_dir, env) as process:
        process.wait_until_healthy(f"http://127.0.0.1:{http}/live", _START_S)
        with running("worker", worker, log_dir):
            process.wait_until_healthy(f"http://127.0.0.1:{http}/ready", _START_S)
            yield Target(process, Address("127.0.0.1", http))


def _await_listener(process: ServerProcess, address: Address) -> None:
    async def listens() -> None:
        async with asyncio.timeout(_START_S):
            while process.wait(0) is None:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection(address.host, address.port)
                    writer.close()
                    return
                await asyncio.sleep(0.05)

    asyncio.run(listens())


class InstantWorker:
    """A decode worker that is never short of anything."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._decoder: Decoder[RouterToWorker] = Decoder(RouterToWorker)
        self._seq = 0
        self._num_running = 0
        self._streams: dict[str, asyncio.Task[None]] = {}

    @classmethod
    async def join(cls, control: Address, max_model_len: int) -> InstantWorker:
        bound = max_frame_bytes(max_model_len)
        channel = await connect(control, "d-0", secret=SharedSecret(SECRET.encode()), max_frame_bytes=bound)
        worker = cls(channel)
        channel.send(msgspec.structs.replace(hello(), version=__version__, model=MODEL, max_model_len=max_model_len))
        worker._beat()
        return worker

    async def work(self) -> None:
        """Until the router is gone."""
        beats = asyncio.create_task(self._keep_beating())
        with contextlib.suppress(WorkerLost):
            await self._serve()
        beats.cancel()

    def leave(self) -> None:
        self._channel.abort()

    def _beat(self) -> None:
        self._seq += 1
        self._channel.send(status(seq=self._seq, steps=self._seq, num_running=self._num_running))

    async def _keep_beating(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            self._beat()

    async def _serve(self) -> None:
        while True:
            message = self._decoder.decode(await self._channel.recv())
            if isinstance(message, Abort) and not message.choices:
                if (stream := self._streams.pop(message.request_id, None)) is not None:
                    stream.cancel()
            elif isinstance(message, EmbedTask):
                self._channel.send(_embedding(message.spec))
            elif isinstance(message, LocalTask):
                name = message.spec.request_id
                self._streams[name] = asyncio.create_task(self._answer(message.spec))

    async def _answer(self, spec: RequestSpec) -> None:
        self._num_running += len(spec.choices)
        try:
            for message in self._prompt_logprobs(spec):
                self._channel.send(message)
            total, start = self._num_tokens(spec), 0
            while start < total:
                count = total if total <= _FREE_TOKENS else 1
                self._channel.send(StepTokens(updates=(self._update(spec, start, count, total),)))
                start += count
                if start < total:
                    await asyncio.sleep(_STEP_S)
        finally:
            self._streams.pop(spec.request_id, None)
            self._num_running -= len(spec.choices)

    def _num_tokens(self, spec: RequestSpec) -> int:
        sampling = spec.sampling
        if sampling.ignore_eos:
            return sampling.max_tokens
        return min(sampling.max_tokens, max(_FREE_TOKENS, sampling.min_tokens))

    def _update(self, spec: RequestSpec, start: int, count: int, total: int) -> RequestTokens:
        is_last = start + count == total
        finish = FinishReason.LENGTH if total == spec.sampling.max_tokens else FinishReason.STOP
        tokens = tuple(_token(start + offset, spec.sampling.logprobs) for offset in range(count))
        choices = tuple(ChoiceTokens(choice, start, tokens, finish if is_last else None) for choice in spec.choices)
        return RequestTokens(spec.request_id, spec.attempt, choices, 0)

    def _prompt_logprobs(self, spec: RequestSpec) -> Iterator[PromptLogprobs]:
        if spec.sampling.prompt_logprobs is not None:
            scored = tuple(_token(each, spec.sampling.prompt_logprobs) for each in range(spec.num_prompt_tokens - 1))
            yield from in_pieces(spec, 1, scored)


def _embedding(spec: RequestSpec) -> Embedding:
    return Embedding(
        request_id=spec.request_id,
        attempt=spec.attempt,
        vector=struct.pack("<4f", 0.5, 0.5, 0.5, 0.5),
        num_cached_tokens=0,
        prefill_s=0.0,
        queue_s=0.0,
    )


def _token(number: int, num_top: int | None) -> SampledToken:
    token_id = 97 + number % 26
    if num_top is None:
        return SampledToken(token_id)
    return SampledToken(token_id, -0.5, tuple((token_id + rank, -0.5 - rank) for rank in range(num_top)))


async def _serve_control(port: int) -> None:
    """Until it is killed."""
    config = RouterConfig(model_dir=Path("/"), served_model_name=MODEL, expect_prefill=False)
    metrics = RouterMetrics(MODEL)
    dispatcher = Dispatcher(config, LeastLoaded(expect_prefill=False), SystemClock(), metrics)
    control = ControlServer([WorkerGroup(Expected(version="0", model=MODEL), dispatcher)], router_id="router-fuzz")
    await control.start(Address("127.0.0.1", port))
    await control.wait()


async def _work(control: Address, max_model_len: int) -> None:
    """Until it is killed: join the router, and again where its session ends."""
    while True:
        worker = await InstantWorker.join(control, max_model_len)
        await worker.work()


def main() -> int:
    configure_logging("error", process="fuzz-target")
    port, *length = map(int, sys.argv[1:])
    asyncio.run(_work(Address("127.0.0.1", port), length[0]) if length else _serve_control(port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
