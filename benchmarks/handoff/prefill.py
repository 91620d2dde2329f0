"""The prefill end of a measured handoff: the prefill worker's own transfer code, driven like an engine would.

    open ─KVOpened─> layers, at once or in their time ─> finish ─> KVArrived ─KVDone─> report

Whoever calls `ship` is the engine's thread: it only says which layer is complete. All clocks are this process's.
"""

from __future__ import annotations

import asyncio
import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

import kvferry
from kvferry.benchmarks.handoff.orders import CONFIG, SECRET
from kvferry.benchmarks.handoff.pages import make_pages
from kvferry.common.clock import SystemClock
from kvferry.common.errors import ConfigError
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.transfer.backends.base import Piece, TransferBackend, TransferHandle, TransferState
from kvferry.transfer.backends.choose import open_backend
from kvferry.transfer.links import KVLinks
from kvferry.transfer.send.plan import ShipPlan
from kvferry.transfer.send.ranks import RankShipping
from kvferry.transfer.send.sender import KVSender
from kvferry.transfer.thread import TransferThread
from kvferry.wire.fields import Message
from kvferry.wire.grants import GrantInfo, RegionInfo
from kvferry.wire.handoff import CancelKV, KVDone, KVOpened, KVRefused, KVRenewed
from kvferry.wire.workers import TransferReport

_END_WITHIN_S = 60.0


class TimedBackend:
    """A backend and the time that its calls take. Implements `TransferBackend`."""

    def __init__(self, backend: TransferBackend) -> None:
        self._backend = backend
        self.name = backend.name
        self.agent = backend.agent
        self.copies_itself = backend.copies_itself
        self.connect_s = 0.0  # of the last new connection
        self.write_s = 0.0
        self.num_writes = 0

    @property
    def lacks_devices(self) -> bool:
        return self._backend.lacks_devices

    @property
    def telemetry_bytes(self) -> int:
        return self._backend.telemetry_bytes

    def register(self, pages: torch.Tensor, *, rank: int, tp_size: int, generation: int) -> RegionInfo:
        return self._backend.register(pages, rank=rank, tp_size=tp_size, generation=generation)

    def rotate(self, generation: int) -> RegionInfo:
        return self._backend.rotate(generation)

    def connect(self, remote: RegionInfo, pieces: tuple[Piece, ...]) -> None:
        start_s = perf_counter()
        self._backend.connect(remote, pieces)
        self.connect_s = max(self.connect_s, perf_counter() - start_s)

    def write(
        self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int], notify: bytes = b""
    ) -> TransferHandle:
        start_s = perf_counter()
        handle = self._backend.write(agent, local_pages, remote_pages, notify)
        self.write_s += perf_counter() - start_s
        self.num_writes += 1
        return handle

    def read(self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int]) -> TransferHandle:
        return self._backend.read(agent, local_pages, remote_pages)

    def poll(self, handle: TransferHandle) -> TransferState:
        return self._backend.poll(handle)

    def release(self, handle: TransferHandle) -> None:
        self._backend.release(handle)

    def notify(self, agent: str, payload: bytes) -> None:
        self._backend.notify(agent, payload)

    def notifications(self) -> list[tuple[str, bytes]]:
        return self._backend.notifications()

    def disconnect(self, agent: str) -> None:
        self._backend.disconnect(agent)

    def close(self) -> None:
        self._backend.close()


@dataclass(slots=True, frozen=True)
class HandoffTimes:
    """One handoff, in seconds."""

    total_s: float  # first layer complete -> KVDone is here: the decode worker may use it
    exposed_s: float  # last layer complete -> KVDone is here
    written_s: float  # first post -> last write done
    write_s: float  # spent in posting
    num_writes: int
    engine_s: float  # the engine's thread spent in saying which layers are complete
    open_s: float  # asking for the right to write, which a prompt's first layer hides
    num_bytes: int


@dataclass(slots=True, frozen=True)
class Pace:
    """How an engine would come along. `work` computes until the time that it is given."""

    chunk_blocks: int
    layer_s: float  # between two layers' ends
    work: Callable[[float], None]


class PrefillEnd:
    """Four threads, as in a worker: the caller (engine), transfer, network, and nobody else."""

    def __init__(self, spec: KVCacheSpec, num_blocks: int, backend: str, device: str) -> None:
        self._spec = spec
        self.pages = make_pages(spec, num_blocks, device)
        incarnation = secrets.randbits(63)
        self.backend = TimedBackend(open_backend(backend, f"p-0.{incarnation:x}.0.0"))
        self.backend.register(self.pages, rank=0, tp_size=1, generation=0)
        self._answers: queue.SimpleQueue[tuple[float, TransferReport | BaseException | None]] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._network = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._links = KVLinks("p-0", SECRET, self._on_answer, self._on_lost)
        self._sender = KVSender(
            rank=0,
            tp_size=1,
            worker_id="p-0",
            incarnation=incarnation,
            version=kvferry.__version__,
            backend=self.backend,
            spec=spec,
            num_blocks=num_blocks,
            clock=SystemClock(),
            config=CONFIG,
            to_peer=self._to_decode,
            report=lambda open_id, report: self._say(report),
            source_free=lambda open_id: None,
        )
        self._thread = TransferThread(self.backend, sender=self._sender, on_failure=self._say)
        self._shipping = RankShipping(
            self._thread,
            self._sender,
            spec=spec,
            tp_size=1,
            broadcast=None,
            layer_event=lambda: None,  # what is shipped was there before
            on_source_free=lambda open_id: None,
        )
        self._thread.start()
        self._network.start()

    def _to_decode(self, kv_address: str, message: Message) -> None:
        self._loop.call_soon_threadsafe(self._links.send, kv_address, message)

    def _on_answer(self, kv_address: str, message: Message) -> None:
        assert isinstance(message, KVOpened | KVRefused | KVRenewed | CancelKV | KVDone)
        self._shipping.on_answer(message)
        if isinstance(message, KVOpened):
            self._say(None)  # calls from now on come behind it

    def _on_lost(self, kv_address: str) -> None:
        self._shipping.on_peer_lost(kv_address)

    def _say(self, what: TransferReport | BaseException | None) -> None:
        """To the caller, from any thread."""
        self._answers.put((perf_counter(), what))

    def _wait(self) -> tuple[float, TransferReport | None]:
        """The next answer and when it came."""
        try:
            when_s, answer = self._answers.get(timeout=_END_WITHIN_S)
        except queue.Empty:
            raise ConfigError(f"a handoff did not go on for {_END_WITHIN_S:g} s") from None
        if isinstance(answer, BaseException):
            raise answer
        if answer is not None and not answer.clean:
            raise ConfigError(f"the handoff failed after {answer.num_bytes} bytes")
        return when_s, answer

    def open(self, request_id: str, grant: GrantInfo) -> int:
        """Ask for the right to write, and wait for it."""
        open_id = self._shipping.open(request_id, 0, grant)
        _, report = self._wait()
        if report is not None:
            raise ConfigError("the decode end refused the handoff")
        return open_id

    def ship(
        self, request_id: str, grant: GrantInfo, local_blocks: Sequence[int], pace: Pace | None = None
    ) -> HandoffTimes:
        """Hand over a whole prompt. Without a pace all layers are complete at once."""
        asked_s = perf_counter()
        open_id = self.open(request_id, grant)
        self.backend.write_s, self.backend.num_writes = 0.0, 0
        open_s = perf_counter() - asked_s
        first_s, last_s, engine_s = self._ship_layers(open_id, grant, local_blocks, pace)
        self._shipping.finish(open_id, ())
        done_s, report = self._wait()
        assert report is not None
        return HandoffTimes(
            total_s=done_s - first_s,
            exposed_s=done_s - last_s,
            written_s=report.transfer_s,
            write_s=self.backend.write_s,
            num_writes=self.backend.num_writes,
            engine_s=engine_s,
            open_s=open_s,
            num_bytes=report.num_bytes,
        )

    def _ship_layers(
        self, open_id: int, grant: GrantInfo, local_blocks: Sequence[int], pace: Pace | None
    ) -> tuple[float, float, float]:
        """When the first layer was complete, when the last was, and how long saying so took."""
        num_blocks, engine_s = len(local_blocks), 0.0
        chunk_blocks = pace.chunk_blocks if pace is not None else num_blocks
        due_s = first_s = perf_counter()
        for start in range(0, num_blocks, chunk_blocks):
            end = min(start + chunk_blocks, num_blocks)
            local, remote = tuple(local_blocks[start:end]), grant.block_ids[start:end]
            self._shipping.begin_step([ShipPlan(open_id, local, remote, last=end == num_blocks)])
            for layer in range(self._spec.num_layers):
                if pace is not None:
                    due_s += pace.layer_s
                    pace.work(due_s)
                last_s = perf_counter()
                if start == 0 and layer == 0:
                    first_s = last_s
                self._shipping.on_layer(layer)
                engine_s += perf_counter() - last_s
        return first_s, last_s, engine_s

    def cancel(self, open_id: int) -> None:
        """Give an open up, and wait for its end."""
        self._shipping.cancel(open_id, "measured")
        self._wait()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._links.close(), self._loop).result(_END_WITHIN_S)
        self._thread.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._network.join()
        self._loop.close()
