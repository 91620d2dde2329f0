"""A worker's two sides under one lock: prefill and decode, the engine loop that serves both, and what routers are told.

router message ─[lock]─> RolePair ─> PrefillSide's or DecodeSide's role        engine loop ─> RolePair ─> the same
"""

from __future__ import annotations

import threading

from ..common.errors import ProtocolError
from ..common.messages import CacheChange, LocalTask, Message, PrefillTask, ReserveKV, WorkerStatus
from ..engine.loop import EngineLoop
from ..engine.samples import RouterSamples
from ..kvcache.journal import open_journal
from ..transfer.protocol.rank_messages import PeerMessage, RankArrived, RankRead, RankSums, Rotated, SourceFree
from .decode_side import DecodeSide
from .deps import WorkerDeps
from .prefill_side import PrefillSide
from .roles import RoleName, RolePair
from .shares import RouterShares

_ROLES: dict[str, RoleName] = {"prefill": "prefill", "decode": "decode"}


class Worker:
    """Runs on the network thread, but where a method says otherwise."""

    def __init__(self, deps: WorkerDeps) -> None:
        self._deps = deps
        self._lock = threading.Condition()
        self._prefill = PrefillSide(deps, self._lock)
        self._decode = DecodeSide(deps, self._lock)
        self._samples = RouterSamples()
        self._shares = RouterShares(deps.clock)
        self._num_heartbeats = 0
        self._journal = open_journal(deps.pool, deps.cache)
        deps.cache.wake_with(self._wake)

    async def start(self) -> None:
        deps = self._deps
        await self._decode.start()
        self._prefill.start()
        self._decode.role.fetches = self._prefill.fetches
        self._roles = RolePair(self._prefill.role, self._decode.role, deps.pool, deps.config.role)
        self._roles.learn(deps.samples)
        self.loop = EngineLoop(
            self._roles, deps.engine.step, deps.on_failure, lock=self._lock, on_step=self._samples.add
        )
        self.loop.start()

    @property
    def kv_address(self) -> str:
        """Return where prefill workers ask to write, whatever the role: what was granted arrives."""
        return self._decode.kv_address

    # --- routers ----------------------------------------------------------------------------------------

    def on_router_message(self, router_id: str, message: Message) -> None:
        with self._lock:
            if isinstance(message, PrefillTask | ReserveKV | LocalTask):
                self._shares.note_work(router_id)
            self._roles.on_router_message(router_id, message)
            self._decode.after_change()

    def on_router_lost(self, router_id: str) -> None:
        with self._lock:
            self._samples.forget(router_id)
            self._journal.router_left(router_id)
            self._roles.on_router_lost(router_id)
            self._decode.after_change()

    def set_role(self, role: str) -> None:
        """Make it the active one. Raises ProtocolError for what is no role."""
        if role not in _ROLES:
            raise ProtocolError(f"{role!r} is no role")
        with self._lock:
            self._roles.set_role(_ROLES[role])
            self._decode.after_change()

    def drain(self) -> None:
        """Take nothing new."""
        with self._lock:
            self._roles.draining = True

    def _wake(self) -> None:
        """Have the engine look for work. From any thread."""
        with self._lock:
            self._lock.notify()

    def on_follower(self, rank: int, message: Message) -> None:
        """Take another rank's message. On the rank group's thread."""
        match message:
            case PeerMessage() | SourceFree() | RankRead():
                self._prefill.on_follower(message)
            case RankArrived() | Rotated() | RankSums():
                self._decode.on_follower(message)
            case _:
                raise AssertionError(f"unexpected {type(message).__name__} from rank {rank}")

    def tick(self) -> None:
        """Deadlines; ten times a second."""
        with self._lock:
            self._roles.tick()
            self._prefill.tick()
            self._decode.tick()
            self._decode.after_change()

    def on_router_joined(self, router_id: str) -> None:
        """A session has begun."""
        with self._lock:
            self._journal.router_joined(router_id)

    def cache_changes(self) -> list[tuple[str, CacheChange]]:
        """Return what routers are to be told of the caches, since the last call."""
        with self._lock:
            return list(self._journal.drain())

    # --- what others see --------------------------------------------------------------------------------

    @property
    def active_role(self) -> RoleName:
        return self._roles.active_role

    @property
    def decodes(self) -> bool:
        """The worker decodes: its role, or answers that are not finished."""
        with self._lock:
            return self._roles.active_role == "decode" or self._decode.num_unfinished > 0

    @property
    def is_busy(self) -> bool:
        with self._lock:
            return self._roles.num_unfinished > 0

    @property
    def num_unfinished(self) -> int:
        """Return how much a drain waits for: requests, and handoffs in both directions."""
        with self._lock:
            return self._prefill.num_unfinished + self._decode.num_unfinished

    def status(self, router_id: str) -> WorkerStatus:
        """The next heartbeat to this router."""
        self._num_heartbeats += 1
        roles, pool, deps = self._roles, self._deps.pool, self._deps
        with self._lock:
            status = WorkerStatus(
                seq=self._num_heartbeats,
                state="draining" if roles.draining else "ready",
                num_running=roles.num_running,
                num_waiting=roles.num_waiting,
                waiting_tokens=roles.waiting_tokens,
                num_free_blocks=pool.num_free_blocks,
                num_cached_blocks=pool.num_cached_blocks,
                num_granted_blocks=roles.num_granted_blocks,
                num_quarantined_blocks=pool.num_quarantined_blocks,
                num_blocks=pool.num_blocks,
                steps=self.loop.num_steps,
                busy_for_s=self.loop.busy_for_s,
                step_s=self.loop.last_step_s,
                step_tokens=self.loop.last_step_tokens,
                num_preemptions=roles.num_preemptions,
                prefix_queries=roles.prefix_queries,
                prefix_hits=roles.prefix_hits,
                transfer_bytes=self._prefill.num_transfer_bytes,
                wire_bytes=deps.outgoing.telemetry_bytes,
                transfer_failures=self._prefill.num_transfer_failures + self._decode.num_transfer_failures,
                stale_messages=roles.stale_messages,
                host_blocks=len(deps.cache.host),
                disk_blocks=deps.cache.num_disk_blocks,
                promoted_blocks=deps.cache.num_promoted_blocks,
                demoted_blocks=deps.cache.num_demoted_blocks,
                tier_failures=deps.cache.num_failures,
                role=roles.active_role,
                decode_context=roles.decode.scheduler.num_context_tokens,
                samples=self._samples.take(router_id),
                share=self._shares.share(router_id, roles.routers),
                num_fetches=self._prefill.fetches.num_fetches,
                failed_fetches=self._prefill.fetches.num_failures,
                fetched_bytes=self._prefill.fetches.num_bytes,
                fetch_s=self._prefill.fetches.seconds,
                nonfinite_rows=roles.num_nonfinite_rows,
            )
            return self._decode.complete_status(status)

    async def close(self) -> None:
        self.loop.stop()
        await self._prefill.close()
        await self._decode.close()
        self._deps.cache.close()
