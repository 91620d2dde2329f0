"""A worker on its machine: its core under one lock, driven by threads and sockets.

    network thread    routers' messages, the handoff's sockets, ticks ─┐
    engine thread     schedule, compute, complete ─────────────────────┼─[lock]─> WorkerCore ─> sockets, transfer
    transfer threads  arrivals; what was written, what was read ───────┤                        threads, other ranks
    rank group        the same of the other tensor-parallel ranks ─────┘

Nobody holds the lock while computing, copying or waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..common.request import BlockId
from ..engine.loop import EngineLoop
from ..transfer.links import KVLinks, KVServer
from ..transfer.protocol.handoff import Verdict
from ..transfer.protocol.rank_messages import ReadOutcome
from ..wire.codec import DecodeToPrefill, FetcherToLender, LenderToFetcher, PrefillToDecode
from ..wire.fields import Message
from ..wire.grants import RegionInfo
from ..wire.handoff import KVArrived
from ..wire.workers import TransferReport, WorkerStatus
from .core import WorkerCore
from .deps import WorkerDeps, core_config
from .status import make_status
from .transfers import Transfers

_LEAVE_LIMIT_S = 1.0  # a step waits no longer for words about it to be written: no token leaves meanwhile either


class Worker:
    """Implements `Effects` for its core and `Heard` for its transfers.

    Runs on the network thread, but where a method says otherwise.
    """

    def __init__(self, deps: WorkerDeps, announce: Callable[[], None]) -> None:
        """`announce()`: send every router a heartbeat now."""
        config = deps.config
        self._deps = deps
        self.announce = announce
        self._lock = threading.Condition()  # notified when there may be work
        self._server = KVServer(config.worker_id, deps.secret, self._on_peer_message, self._on_peer_lost)
        self._links = KVLinks(config.worker_id, deps.secret, self._on_answer, self._on_target_lost)
        self._transfers = Transfers(deps, self)

    async def start(self) -> None:
        deps, engine = self._deps, self._deps.engine
        self.kv_address = str(await self._server.start(deps.config.host, deps.config.port))
        self._core = WorkerCore(
            core_config(
                deps,
                self.kv_address,
                checks_bytes=self._transfers.checks_bytes,
                sums_writes=self._transfers.sums_writes,
                sums_loans=self._transfers.sums_loans,
            ),
            pool=deps.pool,
            cache=deps.cache,
            clock=deps.clock,
            effects=self,
            shipping=self._transfers.shipping,
            reading=self._transfers.reading,
            regions=deps.regions,
            grammars=deps.grammars,
            adapters=deps.adapters,
            count_experts=engine.expert_loads,
        )
        self._core.roles.learn(deps.samples)
        deps.cache.wake_with(self._wake_from_elsewhere)
        deps.grammars.on_ready = self._wake_from_elsewhere
        if deps.adapters is not None:
            deps.adapters.wake = self._wake_from_elsewhere
        self._transfers.incoming.start()
        self._transfers.outgoing.start()
        self.loop = EngineLoop(
            self._core.steps, deps.engine.step, deps.on_failure, lock=self._lock, prepare=deps.engine.prepare_thread
        )
        self.loop.start()

    # --- routers and time, on the network thread -----------------------------------------------------------------

    def on_router_message(self, router_id: str, message: Message) -> None:
        with self._lock:
            self._core.on_router_message(router_id, message)

    def on_router_joined(self, router_id: str) -> None:
        with self._lock:
            self._core.on_router_joined(router_id)

    def on_router_lost(self, router_id: str) -> None:
        with self._lock:
            self._core.on_router_lost(router_id)

    def drain(self, limit_s: float) -> None:
        with self._lock:
            self._core.drain(limit_s)

    def tick(self) -> None:
        with self._lock:
            self._core.tick()

    def status(self, router_id: str) -> WorkerStatus:
        with self._lock:
            return make_status(self._core, router_id, self.loop.figures())

    @property
    def decodes(self) -> bool:
        with self._lock:
            return self._core.decodes

    @property
    def active_role(self) -> str:
        return self._core.roles.active_role

    @property
    def has_drained(self) -> bool:
        with self._lock:
            return self._core.has_drained

    @property
    def num_unfinished(self) -> int:
        with self._lock:
            return self._core.num_unfinished

    # --- other workers, on the network thread --------------------------------------------------------------------

    def _on_peer_message(self, session: str, message: PrefillToDecode | FetcherToLender) -> None:
        with self._lock:
            self._core.on_peer_message(session, message)

    def _on_peer_lost(self, session: str) -> None:
        with self._lock:
            self._core.on_peer_lost(session)

    def _on_answer(self, kv_address: str, message: DecodeToPrefill | LenderToFetcher) -> None:
        if isinstance(message, DecodeToPrefill):
            self._transfers.shipping.on_answer(message)
            return
        with self._lock:
            self._core.on_fetch_answer(message)

    def _on_target_lost(self, kv_address: str) -> None:
        self._transfers.shipping.on_peer_lost(kv_address)
        with self._lock:
            self._core.on_target_lost(kv_address)

    # --- transfers, on the transfer threads and the rank group's -------------------------------------------------

    def on_arrived(self, rank: int, message: KVArrived, verdict: Verdict) -> None:
        with self._lock:
            self._core.on_arrived(rank, message, verdict)

    def on_rotated(self, regions: tuple[RegionInfo, ...] | None) -> None:
        with self._lock:
            self._core.on_rotated(regions)

    def on_sums(self, rank: int, fetch_id: int, checksum: bytes) -> None:
        with self._lock:
            self._core.on_sums(rank, fetch_id, checksum)

    def on_read(self, rank: int, fetch_id: int, outcome: ReadOutcome, sums: bytes) -> None:
        with self._lock:
            self._core.on_read(rank, fetch_id, outcome, sums)

    def on_report(self, open_id: int, report: TransferReport) -> None:
        with self._lock:
            self._core.on_report(open_id, report)

    def on_rank_free(self, open_id: int) -> None:
        with self._lock:
            self._transfers.shipping.on_rank_free(open_id)

    def on_source_free(self, open_id: int) -> None:
        self._core.on_source_free(open_id)

    def on_follower(self, rank: int, message: Message) -> None:
        """Take another rank's message. On the rank group's thread."""
        self._transfers.on_follower(rank, message)

    # --- effects, from any thread --------------------------------------------------------------------------------

    def to_router(self, router_id: str, message: Message) -> None:
        self._deps.to_router(router_id, message)

    def to_peer(self, session: str, message: Message) -> None:
        self._deps.call_soon(lambda: self._server.send(session, message))

    def to_target(self, kv_address: str, message: Message) -> None:
        self._deps.call_soon(lambda: self._links.send(kv_address, message))

    def rotate(self, generation: int) -> None:
        self._transfers.rotate(generation)

    def watch(self, on: bool) -> None:
        self._transfers.watch(on)

    def sum_loan(self, fetch_id: int, blocks: tuple[BlockId, ...], num_thin: int) -> None:
        self._transfers.sum_loan(fetch_id, blocks, num_thin)

    def leaving(self) -> Callable[[], object]:
        """Return what waits until the network thread has written all that was sent to routers, in order of calls."""
        left = threading.Event()
        self._deps.call_soon(left.set)
        return lambda: left.wait(_LEAVE_LIMIT_S)

    def stop_step(self) -> None:
        self._deps.engine.stop()

    def wake(self) -> None:
        self._lock.notify()

    def _wake_from_elsewhere(self) -> None:
        with self._lock:
            self._lock.notify()

    async def close(self) -> None:
        self.loop.stop()
        await self._links.close()
        self._transfers.outgoing.close()
        await self._server.close()
        self._transfers.incoming.close()
        self._deps.cache.close()
        self._deps.grammars.close()
        if self._deps.adapters is not None:
            self._deps.adapters.close()
