"""A worker's core: all that it decides between its sockets, its engine and its transfer agents.

    routers          on_router_message, on_router_joined, on_router_lost ─┐
    other workers    on_peer_message, on_peer_lost (they write or read)   │
                     on_answer, on_target_lost (we write or read)         ├─> WorkerCore ─> Effects
    transfers        on_arrived, on_read, on_sums, on_source_free, ...    │
    time             tick                                                 │
    engine           steps: schedule, begin_step, on_layer, complete ─────┘

It has no thread, socket or clock of its own: whoever drives it calls it under one lock (but for begin_step and
on_layer) and carries out its effects. `worker.py` does so with threads and sockets; simulations do it in virtual time.

One rank's sends and reads have a core of their own, the `KVSender`, which belongs to a transfer thread: it is behind
`Shipping` and `Reading` here.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import structlog

from ..common.adapter import AdapterLoader
from ..common.clock import Clock
from ..common.errors import ProtocolError
from ..common.grammar import Grammars
from ..common.request import BlockId
from ..engine.samples import RouterSamples
from ..kvcache.blocks import BlockPool
from ..kvcache.contents import Contents
from ..kvcache.journal import open_journal
from ..kvcache.prefix_cache import PrefixCache
from ..prefill.shipments import Shipping
from ..transfer.fetch.ranks import Reading
from ..transfer.protocol.handoff import Verdict
from ..transfer.protocol.rank_messages import ReadOutcome
from ..transfer.receive.opens import WatchProcesses
from ..transfer.receive.processes import watch as watch_processes
from ..transfer.send.counters import SendCounters
from ..wire.codec import FetcherToLender, LenderToFetcher, PrefillToDecode
from ..wire.fields import Message
from ..wire.grants import RegionInfo
from ..wire.handoff import KVArrived
from ..wire.tasks import EmbedTask, LocalTask, PrefillTask, ReserveKV
from ..wire.workers import Drain, ExpertLoads, SetRole, TransferReport
from .adapters import AdapterCache
from .effects import CoreConfig, Effects
from .experts import ExpertReports
from .parts import CoreParts
from .roles import RoleName, RolePair
from .shares import RouterShares
from .steps import Steps

_ROLES: dict[str, RoleName] = {"prefill": "prefill", "decode": "decode"}
_IDLE_TICKS = 10  # an idle worker sends a heartbeat with every tenth tick

log = structlog.get_logger(__name__)


class WorkerCore:
    """`WorkerCore` joins the parts. Its `steps` are what an engine carries out."""

    def __init__(
        self,
        config: CoreConfig,
        *,
        pool: BlockPool,
        cache: PrefixCache,
        clock: Clock,
        effects: Effects,
        shipping: Shipping,
        reading: Reading,
        regions: tuple[RegionInfo, ...],
        watch_processes: WatchProcesses = watch_processes,
        grammars: Grammars | None = None,
        adapters: AdapterLoader | None = None,
        contents: Contents | None = None,
        count_experts: Callable[[], ExpertLoads] = tuple,
    ) -> None:
        """`cache` is around `pool`. `regions`: of every rank's agent through which others write.

        `grammars`: whoever compiles them calls `wake` when one is ready; None: those that ask for one are refused.
        `adapters`: what loads them; whoever does calls `wake` when one is loaded. `contents`: reads requests; None: by
        their token ids. `count_experts` tells how often they were chosen.
        """
        self.config = config
        self.pool = pool
        self.cache = cache
        self._clock = clock
        self._effects = effects
        self._shipping = shipping
        self.adapters = None if adapters is None else AdapterCache(adapters, clock)
        self._is_watching = False
        self._drains_until: float | None = None
        self._num_ticks = 0
        self.heartbeats = count(1)  # their numbers, to whichever router; `status.py` makes them
        self._was_busy = False
        parts = CoreParts(config, pool, cache, clock, effects, grammars, self.adapters, contents)
        self.receiver = parts.receiver(regions, watch_processes)
        self.decode = parts.decode_role(self.receiver)
        self.lending = parts.lending(lambda: self.receiver.rotation.regions, reserve=self._reserve)
        self.fetches = parts.fetches(reading, reserve=lambda: self.decode.scheduler.queues.growth())
        self.prefill = parts.prefill_role(shipping)
        self.prefill.fetches = self.decode.fetches = self.fetches
        self.roles = RolePair(self.prefill, self.decode, pool, config.role)
        self.shares = RouterShares(clock)
        self.samples = RouterSamples()
        self.steps = Steps(self.roles, self.adapters, self.samples)
        self.expert_reports = ExpertReports(count_experts, clock)
        self.journal = open_journal(pool, cache)

    def _reserve(self) -> int:
        """Return how many blocks running answers are to find."""
        return self.decode.scheduler.growth_reserve

    def _changed(self) -> None:
        """Let progress be made while somebody may write or read, and look for work."""
        wanted = self.receiver.has_open or bool(self.lending)
        if self._is_watching != wanted:
            self._is_watching = wanted
            self._effects.watch(wanted)
        if self.roles.is_step_vain:
            self._effects.stop_step()
        self._effects.wake()

    # --- routers ----------------------------------------------------------------------------------------------

    def on_router_message(self, router_id: str, message: Message) -> None:
        """Take a router's message. Raises ProtocolError for one that makes no sense."""
        match message:
            case Drain():
                self.drain(message.deadline_s)
            case SetRole():
                self.set_role(message.role)
            case PrefillTask() | EmbedTask() | ReserveKV() | LocalTask():
                self.shares.note_work(router_id)
                self.roles.on_router_message(router_id, message)
            case _:
                self.roles.on_router_message(router_id, message)
        self._changed()

    def on_router_joined(self, router_id: str) -> None:
        """Note that a session has begun."""
        self.journal.router_joined(router_id)
        self.expert_reports.forget(router_id)

    def on_router_lost(self, router_id: str) -> None:
        """Give up a router that has been away for too long."""
        self.samples.forget(router_id)
        self.expert_reports.forget(router_id)
        self.journal.router_left(router_id)
        self.roles.on_router_lost(router_id)
        self._changed()

    def drain(self, limit_s: float) -> None:
        """Take nothing new, and say so at once. What is left after `limit_s` goes on elsewhere.

        A drain that is under way ends no later than before.
        """
        log.info("worker_drains", worker_id=self.config.worker_id, limit_s=limit_s)
        until = self._clock.now() + limit_s
        self._drains_until = until if self._drains_until is None else min(until, self._drains_until)
        self.roles.draining = True
        self._effects.announce()

    def set_role(self, role: str) -> None:
        """Make the role the active one, and say so at once. Raises ProtocolError for what is no role."""
        if role not in _ROLES:
            raise ProtocolError(f"{role!r} is no role")
        before = self.roles.active_role
        self.roles.set_role(_ROLES[role])
        self._effects.announce()
        log.info(
            "role_set",
            worker_id=self.config.worker_id,
            role=role,
            before=before,
            num_unfinished=self.num_unfinished,
        )

    # --- other workers ----------------------------------------------------------------------------------------

    def on_peer_message(self, session: str, message: PrefillToDecode | FetcherToLender) -> None:
        """Take a message of a worker that writes or reads here."""
        if isinstance(message, FetcherToLender):
            self.lending.on_message(session, message)
        else:
            self.receiver.on_message(session, message)
        self._changed()

    def on_peer_lost(self, session: str) -> None:
        """Note that the connection of such a worker has ended."""
        self.receiver.on_session_lost(session)
        self._changed()

    def on_fetch_answer(self, message: LenderToFetcher) -> None:
        """Take the answer of a worker that we read from. Those to our writes are the senders'."""
        self.fetches.on_message(message)
        self._effects.wake()

    def on_target_lost(self, kv_address: str) -> None:
        """Note that our connection to a worker has ended, or was not made."""
        self.fetches.on_peer_lost(kv_address)
        self._effects.wake()

    # --- transfers --------------------------------------------------------------------------------------------

    def on_arrived(self, rank: int, message: KVArrived, verdict: Verdict = Verdict.UNCHECKED) -> None:
        """Note that a sending rank's last write into `rank`'s pages has landed, and whether it is what was sent."""
        self.receiver.on_arrived(rank, message, verdict)
        self._changed()

    def on_rotated(self, regions: tuple[RegionInfo, ...] | None) -> None:
        """Go on with new agents of all ranks; None: some rank has none."""
        if regions is None:
            self.receiver.rotation_failed()
        else:
            num_blocks = self.receiver.rotated(regions)
            log.info("transfer_agents_replaced", generation=regions[0].generation, freed_blocks=num_blocks)
        self._changed()

    def on_sums(self, rank: int, fetch_id: int, checksum: bytes) -> None:
        """Pass on a rank's sums of lent blocks."""
        self.lending.on_sums(rank, fetch_id, checksum)

    def on_read(self, rank: int, fetch_id: int, outcome: ReadOutcome, sums: bytes) -> None:
        """Take a rank's word about a read."""
        self.fetches.on_read(rank, fetch_id, outcome, sums)
        self._effects.wake()

    def on_source_free(self, open_id: int) -> None:
        """Give back the source blocks of a shipment, which no rank reads any more."""
        self.prefill.on_source_free(open_id)
        self._effects.wake()

    def on_report(self, open_id: int, report: TransferReport) -> None:
        """Report a shipment's end to its router."""
        router_id = self.prefill.router_of(open_id)
        if router_id is not None:
            self._effects.to_router(router_id, report)

    # --- time -------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Look at deadlines; ten times a second. Heartbeats leave with it: fewer when there is nothing to do."""
        self.steps.serve_adapters()
        self.roles.tick()
        self.fetches.tick()
        self.lending.tick()
        self._changed()
        for router_id, change in self.journal.drain():
            self._effects.to_router(router_id, change)
        if (is_busy := self.is_busy) or self._was_busy or self._num_ticks % _IDLE_TICKS == 0:
            self._effects.announce()
        self._was_busy = is_busy
        self._num_ticks += 1

    # --- what others see --------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        return self.roles.num_unfinished > 0

    @property
    def is_draining(self) -> bool:
        """Tell whether the worker was told to end."""
        return self._drains_until is not None

    @property
    def has_drained(self) -> bool:
        """Tell whether a drain is over: nothing is left, or its time is."""
        return self._drains_until is not None and (not self.num_unfinished or self._clock.now() >= self._drains_until)

    @property
    def decodes(self) -> bool:
        """Tell whether the worker decodes: by its role, or because answers are not finished."""
        return self.roles.active_role == "decode" or self.decode.num_unfinished > 0

    @property
    def num_unfinished(self) -> int:
        """Count what a drain waits for: requests, and handoffs in both directions."""
        return self.roles.num_unfinished + self._shipping.counters().num_unfinished

    def send_counters(self) -> SendCounters:
        """Return what was sent and read, on all ranks."""
        return self._shipping.counters()

    @property
    def is_quiet(self) -> bool:
        """Tell whether nothing is left of any request, fetch or loan."""
        return self.roles.is_quiet and not self.fetches and not self.lending and self.cache.is_quiet

    def references(self) -> list[list[BlockId]]:
        """List all references to blocks of the pool."""
        return self.roles.references() + self.lending.references() + self.fetches.references()

    def check(self) -> None:
        """Assert that all books agree, and that every reference to a block has a holder in one of them."""
        self.roles.check(self.lending.references() + self.fetches.references())
        self.fetches.check()
        if self.adapters is not None:
            self.adapters.check()
        self.cache.check()
