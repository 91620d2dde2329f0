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

import structlog

from ..common.request import BlockId
from ..engine.loop import EngineLoop
from ..transfer.fetch.ranks import RankReading, RankSumming
from ..transfer.fetch.reader import open_block_sums
from ..transfer.links import KVLinks, KVServer
from ..transfer.protocol.checksums import open_check, open_sums
from ..transfer.protocol.handoff import Verdict
from ..transfer.protocol.rank_calls import Each
from ..transfer.protocol.rank_messages import (
    TO_DECODE,
    TO_PREFILL,
    PeerMessage,
    RankArrived,
    RankRead,
    RankSums,
    ReadOutcome,
    Rotated,
    SourceFree,
)
from ..transfer.send.ranks import RankShipping
from ..transfer.send.sender import KVSender
from ..transfer.thread import TransferThread
from ..wire.codec import DecodeToPrefill, FetcherToLender, LenderToFetcher, PrefillToDecode
from ..wire.fields import Message
from ..wire.grants import RegionInfo
from ..wire.handoff import KVArrived
from ..wire.workers import TransferReport, WorkerStatus
from .agents import Agents
from .core import WorkerCore
from .decode_rank import RECEIVING
from .deps import WorkerDeps, core_config
from .status import make_status

_LEAVE_LIMIT_S = 1.0  # a step waits no longer for words about it to be written: no token leaves meanwhile either

log = structlog.get_logger(__name__)


class Worker:
    """Implements `Effects` for its core. Runs on the network thread, but where a method says otherwise."""

    def __init__(self, deps: WorkerDeps, announce: Callable[[], None]) -> None:
        """`announce()`: send every router a heartbeat now."""
        config, engine = deps.config, deps.engine
        self._deps = deps
        self.announce = announce
        self._lock = threading.Condition()  # notified when there may be work
        self._server = KVServer(config.worker_id, deps.secret, self._on_peer_message, self._on_peer_lost)
        self._links = KVLinks(config.worker_id, deps.secret, self._on_answer, self._on_target_lost)
        self._sums = open_sums(config.transfer, engine.kv_pages)
        self._loan_sums = open_block_sums(config.transfer, engine.kv_pages, engine.spec, engine.tp_size)
        self._check = open_check(config.transfer, engine.kv_pages, engine.spec, rank=0, tp_size=engine.tp_size)
        self._incoming = TransferThread(
            deps.backend, on_arrived=self._on_arrived, on_failure=deps.on_failure, prepare=engine.use_device
        )
        self._sender = self._make_sender()
        self._outgoing = TransferThread(
            deps.outgoing, sender=self._sender, on_failure=deps.on_failure, prepare=engine.use_device
        )
        self._make_rank_calls()

    def _make_sender(self) -> KVSender:
        deps, engine = self._deps, self._deps.engine
        return KVSender(
            rank=0,
            tp_size=engine.tp_size,
            worker_id=deps.config.worker_id,
            incarnation=deps.incarnation,
            version=deps.version,
            backend=deps.outgoing,
            spec=engine.spec,
            num_blocks=engine.kv_pages.shape[1],
            clock=deps.clock,
            config=deps.config.transfer,
            to_peer=self.to_target,
            report=self._on_report,
            source_free=self._on_rank_free,
            on_read=lambda fetch_id, outcome, sums: self._on_read(0, fetch_id, outcome, sums),
            sums=self._sums,
            processes=deps.processes,
        )

    def _make_rank_calls(self) -> None:
        """Make what reaches the transfer threads of all ranks."""
        engine = self._deps.engine
        self._shipping = RankShipping(
            self._outgoing,
            self._sender,
            num_layers=engine.spec.num_layers,
            tp_size=engine.tp_size,
            broadcast=self._broadcast(TO_PREFILL),
            layer_event=engine.layer_event,
            on_source_free=lambda open_id: self._core.on_source_free(open_id),
        )
        assert self._sender.reader is not None
        self._reading = RankReading(self._shipping.each, self._sender.reader)
        self._each = Each(RECEIVING, self._incoming, self._broadcast(TO_DECODE))
        self._agents = Agents(self._each, self._incoming, engine.tp_size, done=self._on_rotated)
        self._summing = RankSumming(0, self._loan_sums, self._on_sums)

    async def start(self) -> None:
        deps, engine = self._deps, self._deps.engine
        self.kv_address = str(await self._server.start(deps.config.host, deps.config.port))
        self._core = WorkerCore(
            core_config(
                deps,
                self.kv_address,
                checks_bytes=self._check is not None,
                sums_writes=self._sums is not None,
                sums_loans=self._loan_sums is not None,
            ),
            pool=deps.pool,
            cache=deps.cache,
            clock=deps.clock,
            effects=self,
            shipping=self._shipping,
            reading=self._reading,
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
        self._incoming.start()
        self._outgoing.start()
        self.loop = EngineLoop(
            self._core, deps.engine.step, deps.on_failure, lock=self._lock, prepare=deps.engine.prepare_thread
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
    def is_draining(self) -> bool:
        return self._core.is_draining

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
            self._shipping.on_answer(message)
            return
        with self._lock:
            self._core.on_fetch_answer(message)

    def _on_target_lost(self, kv_address: str) -> None:
        self._shipping.on_peer_lost(kv_address)
        with self._lock:
            self._core.on_target_lost(kv_address)

    # --- transfers, on the transfer threads and the rank group's -------------------------------------------------

    def _on_arrived(self, agent: str, message: KVArrived) -> None:
        """Check what arrived before the lock is taken: that takes longer than anybody should hold it."""
        self._tell_arrived(0, message, self._check.verdict(message) if self._check is not None else Verdict.UNCHECKED)

    def _tell_arrived(self, rank: int, message: KVArrived, verdict: Verdict) -> None:
        with self._lock:
            self._core.on_arrived(rank, message, verdict)

    def _on_rotated(self, regions: tuple[RegionInfo, ...] | None) -> None:
        with self._lock:
            self._core.on_rotated(regions)

    def _on_sums(self, rank: int, fetch_id: int, checksum: bytes) -> None:
        with self._lock:
            self._core.on_sums(rank, fetch_id, checksum)

    def _on_read(self, rank: int, fetch_id: int, outcome: ReadOutcome, sums: bytes) -> None:
        with self._lock:
            self._core.on_read(rank, fetch_id, outcome, sums)

    def _on_report(self, report: TransferReport) -> None:
        with self._lock:
            self._core.on_report(report)

    def _on_rank_free(self, open_id: int) -> None:
        with self._lock:
            self._shipping.on_rank_free(open_id)

    def on_follower(self, rank: int, message: Message) -> None:
        """Take another rank's message. On the rank group's thread."""
        match message:
            case PeerMessage():
                self.to_target(message.kv_address, message.message)
            case SourceFree():
                self._on_rank_free(message.open_id)
            case RankRead():
                self._on_read(message.rank, message.fetch_id, message.outcome, message.sums)
            case RankArrived():
                self._tell_arrived(message.rank, message.message, message.verdict)
            case Rotated():
                self._agents.on_rank(message)
            case RankSums():
                self._on_sums(message.rank, message.fetch_id, message.checksum)
            case _:
                raise AssertionError(f"unexpected {type(message).__name__} from rank {rank}")

    def _broadcast(self, side: bytes) -> Callable[[bytes], None] | None:
        """Return what reaches this side of the other ranks; None: there are none."""
        group = self._deps.group
        return None if group is None else lambda payload: group.broadcast(side + payload)

    # --- effects, from any thread --------------------------------------------------------------------------------

    def to_router(self, router_id: str, message: Message) -> None:
        self._deps.to_router(router_id, message)

    def to_peer(self, session: str, message: Message) -> None:
        self._deps.call_soon(lambda: self._server.send(session, message))

    def to_target(self, kv_address: str, message: Message) -> None:
        self._deps.call_soon(lambda: self._links.send(kv_address, message))

    def rotate(self, generation: int) -> None:
        self._agents.start(generation)

    def watch(self, on: bool) -> None:
        self._each(self._incoming.watch, on)

    def sum_loan(self, fetch_id: int, blocks: tuple[BlockId, ...]) -> None:
        self._each(self._summing.sum_blocks, fetch_id, blocks)

    def leaving(self) -> Callable[[], object]:
        """Return what waits until the network thread has written all that was sent to routers, in order of calls."""
        left = threading.Event()
        self._deps.call_soon(left.set)
        return lambda: left.wait(_LEAVE_LIMIT_S)

    def wake(self) -> None:
        self._lock.notify()

    def _wake_from_elsewhere(self) -> None:
        with self._lock:
            self._lock.notify()

    async def close(self) -> None:
        self.loop.stop()
        await self._links.close()
        self._outgoing.close()
        await self._server.close()
        self._incoming.close()
        self._deps.cache.close()
        self._deps.grammars.close()
        if self._deps.adapters is not None:
            self._deps.adapters.close()
