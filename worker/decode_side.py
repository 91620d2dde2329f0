"""A worker's decode side, wired: role, receiver, transfer thread and the handoff's control socket.

router message ─[lock]─> role ─> receiver            engine loop ─> role ─> tokens to routers
prefill worker ─ socket ─[lock]─> receiver <─[lock]─ arrivals (transfer threads of all ranks)
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec
import structlog

from ..common.messages import (
    KVArrived,
    KVClosed,
    KVFetch,
    KVFetchDone,
    KVOpen,
    KVRenew,
    Message,
    RegionInfo,
    WorkerStatus,
    encode,
)
from ..decode.role import DecodeRole
from ..transfer.fetch.lending import Lending
from ..transfer.fetch.ranks import RankSumming
from ..transfer.fetch.reader import open_block_sums
from ..transfer.links import KVServer
from ..transfer.protocol.checksums import open_check
from ..transfer.protocol.handoff import Endpoint
from ..transfer.protocol.rank_messages import TO_DECODE, RankArrived, RankSums, Rotated, Watch
from ..transfer.receive.receiver import KVReceiver, Verdict
from ..transfer.thread import TransferThread
from .agents import Agents
from .deps import WorkerDeps

_LEAVE_LIMIT_S = 1.0  # a step waits no longer for words about it to be written: no token leaves meanwhile either

log = structlog.get_logger(__name__)


class DecodeSide:
    """Runs on the network thread, but where a method says otherwise."""

    def __init__(self, deps: WorkerDeps, lock: threading.Condition) -> None:
        """`lock`: the worker's. It is notified when there may be work."""
        self._deps = deps
        self._lock = lock
        self._server = KVServer(deps.config.worker_id, deps.secret, self._on_message, self._on_prefill_lost)
        self._thread = TransferThread(
            deps.backend,
            on_arrived=self._on_arrived,
            on_failure=deps.on_failure,
        )
        engine = deps.engine
        self._agents = Agents(
            self._thread,
            engine.tp_size,
            broadcast=self._broadcast if deps.group is not None else None,
            done=self._on_agents_replaced,
        )
        self._check = open_check(deps.config.transfer, engine.kv_pages, engine.spec, rank=0, tp_size=engine.tp_size)
        self._watching = False
        self.kv_address = ""

    async def start(self) -> None:
        deps, config, engine = self._deps, self._deps.config, self._deps.engine
        objective_ms = config.engine.tpot_objective_ms
        self.kv_address = str(await self._server.start(config.host, config.port))
        self.receiver = KVReceiver(
            worker_id=config.worker_id,
            incarnation=deps.incarnation,
            spec=engine.spec,
            tp_size=engine.tp_size,
            pool=deps.pool,
            regions=deps.regions,
            kv_address=self.kv_address,
            config=config.transfer,
            clock=deps.clock,
            version=deps.version,
            transport=deps.backend.name,
            to_router=deps.to_router,
            to_peer=self._to_prefill,
            rotate=self._agents.start,
            checks_bytes=self._check is not None,
        )
        self.lending = self._make_lending()
        self.role = DecodeRole(
            pool=deps.pool,
            spec=engine.spec,
            receiver=self.receiver,
            clock=deps.clock,
            to_router=deps.to_router,
            eos_token_ids=engine.model_config.eos_token_ids,
            max_model_len=engine.model_config.max_model_len,
            max_num_batched_tokens=config.engine.max_num_batched_tokens,
            max_num_seqs=config.engine.max_num_seqs,
            num_swap_blocks=engine.num_swap_blocks,
            cache=deps.cache,
            tpot_objective_s=None if objective_ms is None else objective_ms / 1e3,
            leaving=self._leaving,
        )
        self._thread.start()

    def _make_lending(self) -> Lending:
        deps, config, engine = self._deps, self._deps.config, self._deps.engine
        summing = None
        sums = open_block_sums(config.transfer, engine.kv_pages, engine.spec, engine.tp_size)
        if sums is not None:
            broadcast = self._broadcast if deps.group is not None else None
            summing = RankSumming(self._thread, sums, broadcast, self._on_sums)
        return Lending(
            pool=deps.pool,
            endpoint=Endpoint(engine.spec, deps.version, deps.backend.name, engine.tp_size),
            clock=deps.clock,
            lease_s=config.transfer.lease_s,
            regions=lambda: self.receiver.rotation.regions,
            to_peer=self._to_prefill,
            sum_blocks=summing.start if summing is not None else None,
            needs_checksums=config.transfer.kv_checksum == "on",
            reserve=lambda: self.role.scheduler.growth_reserve,
            lift=lambda hashes, done: deps.cache.lift(hashes, done, reserve=self.role.scheduler.growth_reserve),
        )

    def _broadcast(self, payload: bytes) -> None:
        assert self._deps.group is not None
        self._deps.group.broadcast(TO_DECODE + payload)

    def on_follower(self, message: RankArrived | Rotated | RankSums) -> None:
        """Take another rank's message. On the rank group's thread."""
        match message:
            case RankArrived():
                self._tell_arrived(message.rank, message.message, message.verdict)
            case Rotated():
                self._agents.on_rank(message)
            case RankSums():
                self._on_sums(message.rank, message.fetch_id, message.checksum)

    def after_change(self) -> None:
        """Let progress be made while somebody may write or read, and look for work. The lock is held."""
        wanted = self.receiver.has_open or bool(self.lending)
        if self._watching != wanted:
            self._watching = wanted
            self._thread.watch(self._watching)
            if self._deps.group is not None:
                self._broadcast(encode(Watch(on=self._watching)))
        self._lock.notify()

    def _on_message(self, session: str, message: Message) -> None:
        assert isinstance(message, KVOpen | KVRenew | KVClosed | KVFetch | KVFetchDone)
        with self._lock:
            if isinstance(message, KVFetch | KVFetchDone):
                self.lending.on_message(session, message)
            else:
                self.receiver.on_message(session, message)
            self.after_change()

    def _on_sums(self, rank: int, fetch_id: int, checksum: bytes) -> None:
        """Pass on a rank's sums of lent blocks. On the transfer thread or the rank group's."""
        with self._lock:
            self.lending.on_sums(rank, fetch_id, checksum)

    def tick(self) -> None:
        """Look at lent blocks' leases. The lock is held."""
        self.lending.tick()

    def _on_prefill_lost(self, session: str) -> None:
        with self._lock:
            self.receiver.on_session_lost(session)
            self.after_change()

    def _on_arrived(self, agent: str, message: KVArrived) -> None:
        """Check what arrived, on the transfer thread: that takes longer than anybody should hold the lock."""
        self._tell_arrived(0, message, self._check.verdict(message) if self._check is not None else Verdict.UNCHECKED)

    def _tell_arrived(self, rank: int, message: KVArrived, verdict: Verdict) -> None:
        """Pass on a rank's arrival. On the transfer thread or the rank group's."""
        with self._lock:
            self.receiver.on_arrived(rank, message, verdict)
            self.after_change()

    def _on_agents_replaced(self, regions: tuple[RegionInfo, ...] | None) -> None:
        """Go on with new agents, or without any. On the transfer thread or the rank group's."""
        with self._lock:
            if regions is None:
                self.receiver.rotation_failed()
            else:
                num_blocks = self.receiver.rotated(regions)
                log.info("transfer_agents_replaced", generation=regions[0].generation, freed_blocks=num_blocks)
            self.after_change()

    def _leaving(self) -> Callable[[], object]:
        """Return what waits until the network thread has written all that was sent to routers, in order of calls."""
        left = threading.Event()
        self._deps.call_soon(left.set)
        return lambda: left.wait(_LEAVE_LIMIT_S)

    def _to_prefill(self, session: str, message: Message) -> None:
        """Send to a prefill worker. From any thread."""
        self._deps.call_soon(lambda: self._server.send(session, message))

    @property
    def num_unfinished(self) -> int:
        """Requests, handoffs under way among them. The lock is held."""
        return self.role.num_unfinished

    def complete_status(self, status: WorkerStatus) -> WorkerStatus:
        """Add what swapping, rotations and checks have done. The lock is held."""
        counters, timer = self.receiver.counters, self.receiver.rotation.timer
        return msgspec.structs.replace(
            status,
            num_swapped_blocks=self.role.scheduler.blocks.swap.num_saved_blocks,
            num_fences=timer.num_rotations,
            num_failed_fences=timer.num_failures,
            quarantine_s=self.receiver.quarantine_s(),
            checksum_failures=counters.checksum_failures,
            grant_rejects=tuple(sorted(counters.grant_rejects.items())),
        )

    @property
    def num_transfer_failures(self) -> int:
        return self.receiver.num_failures

    async def close(self) -> None:
        await self._server.close()
        self._thread.close()
