"""One life of a simulated worker: both roles over one pool and one engine, and its session with the router.

    router message ─> active role ─> part ─> engine        heartbeat: ten times a second with work, else once

Role change as in a real worker: the active role changes with the message, started work ends where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING

from ..common.messages import (
    Abort,
    Drain,
    GrantInfo,
    Labels,
    LiveRequests,
    LocalTask,
    Message,
    NoCapacity,
    PrefillTask,
    ReserveKV,
    SetRole,
    WorkerHello,
)
from ..decode.waiting import MAX_WAIT_S
from ..kvcache.blocks import BlockPool
from ..kvcache.journal import open_journal
from ..kvcache.prefix_cache import PrefixCache
from ..kvcache.tiers import TierIndex
from ..transfer.fetch.lending import MAX_LENT_SHARE
from .costs.network import Link, Port
from .decode import DecodePart
from .engine import Engine
from .fetches import SimFetches
from .heartbeat import status_of
from .prefill import PrefillPart
from .reservations import Reservation
from .setup import WorkerSpec, calibration

if TYPE_CHECKING:
    from .world import World

TICK_S = 0.1
IDLE_TICKS = 10
VERSION = "simulated"


class SimWorker:
    """A simulated worker, which is its own `WorkerLink` too: the router sends through it."""

    def __init__(self, world: World, spec: WorkerSpec, worker_id: str, role: str, life: int, labels: Labels) -> None:
        kernel = world.kernel
        self.world = world
        self.spec = spec
        self.worker_id = worker_id
        self.number = world.next_session()
        self.role = role
        self.labels = labels
        self.life = life
        self.is_dead = False
        self.has_left = False  # its session has ended
        self.draining = False
        self.began_s = self.wished_s = kernel.now()
        self.pool = BlockPool(spec.num_blocks, spec.kv.block_size, enable_prefix_caching=spec.prefix_caching)
        self.port = Port()  # receiving
        self.cache = PrefixCache(self.pool, host=TierIndex(spec.host_blocks))
        if spec.prefix_caching:
            self.journal = open_journal(self.pool, self.cache)
            self.journal.router_joined("")
        self.sending = Port()
        self.fetches = SimFetches(
            self.pool,
            kernel,
            self,
            self.port,
            token_bytes=spec.token_bytes,
            reserve=lambda: self.decode.scheduler.growth_reserve,
            also_held=self.cache.has_below,
        )
        self.decode = DecodePart(
            self.pool,
            spec.kv,
            kernel,
            world.job,
            self.to_router,
            fetches=self.fetches,
            cache=self.cache,
            worker_id=worker_id,
            life=life,
            max_num_batched_tokens=spec.decode_tokens,
            max_num_seqs=spec.max_num_seqs,
            tpot_objective_s=spec.tpot_objective_s,
        )
        self.prefill = PrefillPart(
            self.pool,
            spec.kv,
            kernel,
            world.job,
            self.to_router,
            self,
            sending=self.sending,
            fetches=self.fetches,
            cache=self.cache,
            token_bytes=spec.token_bytes,
            max_num_batched_tokens=spec.prefill_tokens,
            max_num_seqs=spec.max_num_seqs,
        )
        # A preempted answer gets the blocks that come free, not the prompts that come.
        self.prefill.scheduler.reserve = lambda: self.decode.scheduler.growth_reserve
        random = Random(f"{world.scenario.seed}/{worker_id}/{life}")
        self.engine = Engine(
            kernel,
            self.cache,
            self.pool,
            spec.steps,
            self.prefill,
            self.decode,
            random,
            copy_s=spec.copy_s,
            jumps=spec.jumps,
        )
        self._num_heartbeats = 0
        self._num_ticks = 0
        self._tick_version = 0
        self._was_busy = False
        self._set_active_role()

    def start(self) -> None:
        """Join the router, begin to tick. Workers do not tick in step."""
        self.world.joined(self, self._hello())
        self._heartbeat()
        self.world.kernel.after(TICK_S * ((self.number * 0.6180339887) % 1.0), self._tick, 0)

    # --- session --------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Take a message from the router."""
        self.world.kernel.after(self.world.scenario.message_s, self._on_message, message)

    def drop(self, reason: str) -> None:
        """The router ended the session: this life is of no use to it."""
        self.world.dropped(self)

    def to_router(self, message: Message) -> None:
        if not self.is_dead:
            self.world.kernel.after(self.world.scenario.message_s, self.world.on_message, self, message)

    def _hello(self) -> WorkerHello:
        spec = self.spec
        return WorkerHello(
            worker_id=self.worker_id,
            role=self.role,
            incarnation=self.life,
            version=VERSION,
            model="simulated",
            spec=spec.kv,
            tp_size=spec.tp_size,
            num_blocks=spec.num_blocks,
            max_model_len=spec.max_model_len,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.prefill_tokens if self.role == "prefill" else spec.decode_tokens,
            kv_address=self.worker_id,
            pid=1,
            transport="simulated",
            can_change_role=spec.can_change_role,
            labels=self.labels,
            samples=calibration(spec),
        )

    def _on_message(self, message: Message) -> None:
        if self.is_dead:
            return
        match message:
            case ReserveKV() | LocalTask():
                self._on_decode_work(message)
            case PrefillTask(spec=spec):
                if self.role == "prefill":
                    self.prefill.on_task(message)
                else:
                    self.prefill.refuse(spec, "wrong_role", "this worker decodes")
            case Abort():
                self.engine.sync()
                self.prefill.on_abort(message)
                self.decode.on_abort(message)
            case SetRole(role=role):
                self.role = role
                self._set_active_role()
                self._heartbeat()
            case Drain():
                self.draining = self.prefill.draining = True
                self.decode.drain()
                self._heartbeat()
            case LiveRequests():
                return  # a new life knows no request
            case _:
                raise AssertionError(f"unexpected {type(message).__name__}")
        if not isinstance(message, ReserveKV):
            self.engine.wake()
        self._hurry()

    def _set_active_role(self) -> None:
        self.decode.set_active(self.role == "decode")

    def _on_decode_work(self, message: ReserveKV | LocalTask) -> None:
        spec = message.spec
        if isinstance(message, ReserveKV):
            self.engine.sync()
            if self.role == "decode":
                if self.decode.on_reserve(message):
                    self.world.kernel.after(MAX_WAIT_S, self.engine.wake)
                self.engine.recheck()
            else:
                self.to_router(NoCapacity(request_id=spec.request_id, attempt=spec.attempt, reason="wrong_role"))
        elif self.role == "decode":
            self.decode.on_local(spec, message.fetch)
        else:
            self.decode.refuse(spec, "wrong_role", "this worker prefills")

    # --- other workers (`Peers`) ----------------------------------------------------------------------------

    def open(self, grant: GrantInfo, request_id: str) -> tuple[Reservation, Link, Port] | None:
        other = self.world.worker(grant.grant_id.worker_id)
        if other is None or other.life != grant.grant_id.incarnation:
            return None
        reservation = other.decode.reservations.open(grant, request_id, self.session)
        if reservation is None:
            return None
        return reservation, self.world.link(self, other), other.port

    def lend(self, worker_id: str, hashes: Sequence[bytes], answer: Callable[[int, Link, Port], None]) -> bool:
        other = self.world.worker(worker_id)
        if other is None or other is self:
            return False
        other.engine.sync_blocks()
        link = self.world.link(other, self)

        def tell() -> None:
            answer(len(other.pool.match_prefix(hashes)), link, other.sending)

        wanted = list(hashes[: int(MAX_LENT_SHARE * other.pool.num_blocks)])
        if other.cache.lift(wanted, tell, reserve=other.decode.scheduler.growth_reserve):
            other.engine.wake()  # they come to the device with its next step
            return True
        if not other.pool.match_prefix(hashes[:1]):
            return False
        tell()
        return True

    @property
    def session(self) -> str:
        return f"{self.worker_id}#{self.life}"

    def arrive(self, reservation: Reservation, num_first_tokens: int, num_bytes: int) -> None:
        grant_id = reservation.grant.grant_id
        other = self.world.worker(grant_id.worker_id)
        if other is None or other.life != grant_id.incarnation or not other.decode.reservations.is_live(reservation):
            return
        other.decode.arrive(reservation, num_first_tokens, num_bytes)
        other.engine.wake()

    def at(self, time_s: float, handler: Callable[..., None], *args: object) -> None:
        self.world.kernel.at(time_s, self._if_alive, handler, args)

    def _if_alive(self, handler: Callable[..., None], args: tuple[object, ...]) -> None:
        if not self.is_dead:
            handler(*args)
            self.engine.wake()

    def on_writer_lost(self, writer: SimWorker) -> None:
        self.engine.sync()
        self.decode.on_writer_lost(writer.session, writer.worker_id)

    # --- time -----------------------------------------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        return self.prefill.num_unfinished + self.decode.num_unfinished

    @property
    def is_busy(self) -> bool:
        return self.engine.is_busy or self.num_unfinished > 0

    def _hurry(self) -> None:
        """Work has come: an idle worker's next heartbeat is due within a tick."""
        if not self._was_busy:
            self._was_busy = True
            self._tick_version += 1
            self.world.kernel.after(TICK_S, self._tick, self._tick_version)

    def _tick(self, version: int) -> None:
        if self.is_dead or version != self._tick_version:
            return
        if self.decode.has_deadlines:
            self.engine.sync()
            self.decode.tick()
            self.engine.recheck()
        if self.spec.prefix_caching:
            self.engine.sync_blocks()
            for _, change in self.journal.drain():
                self.to_router(change)
        self._heartbeat()
        self._was_busy = self.is_busy
        if self.draining and not self._was_busy:
            self.world.leave(self)
            return
        self.world.kernel.after(TICK_S if self._was_busy else TICK_S * IDLE_TICKS, self._tick, version)

    def _heartbeat(self) -> None:
        self._num_heartbeats += 1
        self.to_router(status_of(self, self._num_heartbeats))

    @property
    def prefix_queries(self) -> int:
        return self.prefill.scheduler.prefix_queries + self.decode.prefix_queries

    @property
    def prefix_hits(self) -> int:
        return self.prefill.scheduler.prefix_hits + self.decode.prefix_hits

    def kill(self) -> None:
        """End the worker: what it has streamed is with the router, everything else is lost."""
        self.engine.flush()
        self.is_dead = self.engine.is_dead = True
