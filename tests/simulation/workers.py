"""One life of a simulated worker: the product's core and sender on a simulated machine.

What `worker/worker.py` and `worker/process.py` do with threads and sockets is done here in virtual time: one event is
what one thread does while it holds the lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Any

from kvferry.common.batch import Batch, stopped_output
from kvferry.common.errors import TransferError
from kvferry.engine.loop import StepFigures
from kvferry.kvcache.disk_tier import DiskTier
from kvferry.kvcache.frame_pool import block_pool
from kvferry.kvcache.frames import frames_of
from kvferry.kvcache.prefix_cache import PrefixCache
from kvferry.kvcache.tiers import TierIndex
from kvferry.transfer.fetch.ranks import RankReading, RankSumming
from kvferry.transfer.fetch.reader import BlockSums
from kvferry.transfer.protocol.checksums import ArrivalCheck
from kvferry.transfer.protocol.handoff import Verdict
from kvferry.transfer.send.ranks import RankShipping
from kvferry.transfer.send.sender import KVSender
from kvferry.transfer.send.shipment import Shipment
from kvferry.wire.codec import DecodeToPrefill, FetcherToLender, LenderToFetcher, PrefillToDecode
from kvferry.wire.fields import Message
from kvferry.wire.handoff import KVArrived
from kvferry.wire.results import Grant
from kvferry.wire.tasks import LocalTask, PrefillTask, ReserveKV
from kvferry.wire.workers import Goodbye, SetRole, WorkerHello, WorkerStatus
from kvferry.worker.core import WorkerCore
from kvferry.worker.effects import CoreConfig
from kvferry.worker.roles import RoleName
from kvferry.worker.status import make_status

from .adapters import SimLoader
from .agent import Agent
from .breach import Breach
from .disk import SimDisk
from .drafting import Drafts
from .engine import Engine
from .followers import Follower
from .grammars import LateMasks, SimGrammars
from .heads import HeadsMemory
from .invariants import check_counts, check_displaced, check_holders, check_reservations
from .kernel import Process, ProcessClock
from .landings import Landings
from .memory import Memory
from .network import End
from .oracle import EOS
from .role_rules import RoleRules
from .scenario import SPEC
from .sessions import VERSION, RouterSession
from .sums import MemorySums
from .turns import Links, TransferTurns

if TYPE_CHECKING:
    from .world import World

TICK_S = 0.1
_BOOKS_EVERY = 64  # events of a worker between two looks at all of its books


class Worker:
    """Implements `worker.effects.Effects`. `home`: the role that it starts with, in each of its lives."""

    core: WorkerCore

    def __init__(self, world: World, place: str, incarnation: int, num_blocks: int, home: RoleName) -> None:
        kernel, scenario = world.kernel, world.scenario
        self.world = world
        self.place = place
        self.incarnation = incarnation
        self.home: RoleName = home
        self.process = Process(kernel, place, place, self._after_event)
        self.clock = ProcessClock(kernel, kernel.random.uniform(1, 1000), 1 + kernel.random.uniform(-1e-3, 1e-3))
        self.pool = block_pool(scenario.spec, num_blocks)
        self.num_ranks = scenario.num_ranks[home == "decode"]
        self.memory = self._make_memory(num_blocks)
        self.adapters = SimLoader(self)
        late_masks = LateMasks(f"{place} {incarnation}", world.tally.seen)
        self.engine = Engine(
            place, self.memory, self.pool, world.oracles, SPEC.num_layers, self.adapters, postponed=late_masks
        )
        own = self.memory_of(0)
        self.incoming = self.make_agent(f"{place}.{incarnation:x}.0.0", own, 0)
        self.outgoing = self.make_agent(f"{place}.{incarnation:x}.out.0.0", own, 0)
        self._check = self.make_check(0, own)
        self._summing = self.make_summing(0, own)
        self.kv_address = f"{place}:{incarnation % 50000 + 1}"
        self.sessions: list[RouterSession] = []
        self._by_router: dict[str, RouterSession] = {}
        self._batch: Batch | None = None  # in the step that computes now
        self._tells_layers = False  # that step ships: its layers are told one by one, as time passes
        self._is_waking = False
        self._step_began_s = 0.0
        self._stops = Random(f"stops {place} {incarnation}")
        self._is_stopped = False  # the step that computes now
        self._last_step = (0.0, 0)
        self._num_events = 0
        self._peers: dict[str, End] = {}  # sessions of those that write or read here
        self._peer_numbers = count(1)
        self._turns = TransferTurns(self, scenario.turn_s, lambda: self.sender.step())
        self._links = Links(self, self._on_answer, self._on_target_lost)
        self.sender = self.make_sender(0, self.outgoing)
        self.followers = [Follower(self, rank) for rank in range(1, self.num_ranks)]
        self.senders = [self.sender, *(follower.sender for follower in self.followers)]
        self._shipping = self._make_shipping()
        self.cache = self._make_cache()
        self.core = self._make_core()
        speculation = self.core.decode.scheduler.speculation
        is_own = scenario.spec.draft or (scenario.speculative is not None and scenario.speculative.method == "suffix")
        if speculation is not None and not is_own:  # else the engine says them, or earlier answers do
            speculation.make_proposer = lambda seq: Drafts(world.oracles[seq.request_id].answers[seq.choice])
        self.cache.wake_with(self.wake)
        self._landings = Landings(self)
        self._rules = RoleRules(self)
        self.outgoing.poke = self._turns.poke
        for rank, (incoming, outgoing, check) in enumerate(self._ends()):
            incoming.right = outgoing.right = self._landings
            incoming.on_arrived = partial(self._on_arrived, rank, check)
        world.addresses[self.kv_address] = self
        self._start()

    def _make_memory(self, num_blocks: int) -> Memory:
        scenario = self.world.scenario
        if scenario.shares_heads:
            return HeadsMemory(scenario.spec, num_blocks, self.num_ranks)
        states_from = SPEC.num_layers if scenario.keeps_states else None
        return Memory(
            scenario.spec.num_layers,
            num_blocks,
            scenario.spec.block_size,
            states_from=states_from,
            windows=scenario.spec.windows,
            frames=frames_of(scenario.spec),
        )

    def memory_of(self, rank: int) -> Memory:
        """What a rank computes: its heads, or the same pages as all others."""
        return self.memory.ranks[rank] if isinstance(self.memory, HeadsMemory) else self.memory

    def make_agent(self, name: str, memory: Memory, rank: int) -> Agent:
        world = self.world
        agent = Agent(name, self.place, world.fabric, self.process, memory, world.scenario.spec, rank, self.num_ranks)
        agent.pass_point = lambda point: world.pass_point(point, self)
        return agent

    def _make_sums(self, memory: Memory) -> Any:
        """Sums over tags instead of bytes; None: no checksums are made."""
        scenario = self.world.scenario
        return MemorySums(memory, scenario.spec.page_bytes(self.num_ranks)) if scenario.has_checksums else None

    def make_check(self, rank: int, memory: Memory) -> ArrivalCheck | None:
        """What looks at the arrivals of a rank; None: nothing does."""
        sums, spec = self._make_sums(memory), self.world.scenario.spec
        if sums is None:
            return None
        return ArrivalCheck(sums, spec, rank=rank, tp_size=self.num_ranks, num_blocks=self.pool.num_blocks)

    def make_summing(self, rank: int, memory: Memory) -> RankSumming:
        """What sums the blocks that a rank lends."""
        sums, spec = self._make_sums(memory), self.world.scenario.spec
        loan_sums = None if sums is None else BlockSums(sums, spec, self.num_ranks, self.pool.num_blocks)
        return RankSumming(rank, loan_sums, lambda *told: self.core.on_sums(*told))

    def _ends(self) -> Iterator[tuple[Agent, Agent, ArrivalCheck | None]]:
        """Yield each rank's agents, and what looks at its arrivals."""
        yield self.incoming, self.outgoing, self._check
        yield from ((each.incoming, each.outgoing, each.check) for each in self.followers)

    def _make_cache(self) -> PrefixCache:
        """The tiers that the scenario gives; a disk keeps what earlier lives have left."""
        scenario = self.world.scenario
        host = TierIndex(scenario.num_host_blocks, scenario.num_swap_blocks)
        file = self.world.disks.get(self.place)
        disk = None
        if file is not None and host.num_slots:
            disk = DiskTier(SimDisk(self, file), host, self.clock, lambda result: None)
        return PrefixCache(self.pool, host=host, disk=disk, spec=scenario.spec)

    def make_sender(self, rank: int, outgoing: Agent) -> KVSender:
        scenario = self.world.scenario
        sender = KVSender(
            rank=rank,
            tp_size=self.num_ranks,
            worker_id=self.place,
            incarnation=self.incarnation,
            version=VERSION,
            backend=outgoing,
            spec=scenario.spec,
            num_blocks=self.pool.num_blocks,
            clock=self.clock,
            config=scenario.transfer,
            to_peer=self.to_target,
            report=lambda open_id, report: self.core.on_report(open_id, report),
            source_free=lambda open_id: self._shipping.on_rank_free(open_id),
            on_read=lambda fetch_id, outcome, sums: self.core.on_read(rank, fetch_id, outcome, sums),
            sums=self._make_sums(outgoing.memory),
            max_in_flight_bytes=scenario.max_in_flight_bytes,
            max_write_bytes=scenario.max_write_bytes,
            processes=(self.world.mark_of(self.process),),
        )
        post = sender._writes.post

        def post_named(shipment: Shipment, *args: Any) -> None:
            """Tell the agent for which open the write is, so that its landing can be judged."""
            outgoing.writing = (shipment.grant.grant_id, shipment.open_id)
            post(shipment, *args)

        sender._writes.post = post_named  # type: ignore[method-assign, assignment]
        return sender

    def _make_shipping(self) -> RankShipping:
        return RankShipping(
            self._turns,
            self.sender,
            spec=self.world.scenario.spec,
            tp_size=self.num_ranks,
            broadcast=self._broadcast if self.followers else None,
            layer_event=lambda: None,
            on_source_free=lambda open_id: self.core.on_source_free(open_id),
        )

    def _broadcast(self, payload: bytes) -> None:
        for follower in self.followers:
            follower.calls.run(payload)

    def _make_core(self) -> WorkerCore:
        scenario = self.world.scenario
        assert self.sender.reader is not None
        config = CoreConfig(
            worker_id=self.place,
            incarnation=self.incarnation,
            version=VERSION,
            served_model="m",
            role=self.home,
            spec=scenario.spec,
            tp_size=self.num_ranks,
            kv_address=self.kv_address,
            incoming=self.incoming.name,
            outgoing=self.outgoing.name,
            transfer=scenario.transfer,
            eos_token_ids=frozenset({EOS}),
            max_model_len=scenario.max_model_len,
            max_num_batched_tokens=scenario.max_num_batched_tokens,
            max_num_seqs=scenario.max_num_seqs,
            num_swap_blocks=scenario.num_swap_blocks,
            speculative=scenario.speculative,
            keeps_states=scenario.keeps_states,
            checks_bytes=scenario.has_checksums,
            sums_writes=scenario.has_checksums,
            sums_loans=scenario.has_checksums,
        )
        return WorkerCore(
            config,
            pool=self.pool,
            cache=self.cache,
            clock=self.clock,
            effects=self,
            shipping=self._shipping,
            reading=RankReading(self._shipping.each, self.sender.reader),
            regions=tuple(incoming.region() for incoming, _, _ in self._ends()),
            watch_processes=self.world.watch,
            grammars=SimGrammars(self),
            adapters=self.adapters,
        )

    def _start(self) -> None:
        """Join the routers, begin to tick."""
        for router in range(len(self.world.routers)):
            self.sessions.append(
                RouterSession(
                    self.world.network,
                    self.place,
                    self.process,
                    lambda number=router: self.world.routers[number],  # type: ignore[misc]
                    hello=self._hello(),
                    status=self._status,
                    on_message=self._on_router_message,
                    on_lost=self.core.on_router_lost,
                    on_joined=self.core.on_router_joined,
                )
            )
        self.process.after(TICK_S * self.world.kernel.random.random(), self._tick)

    def _hello(self) -> WorkerHello:
        scenario = self.world.scenario
        return WorkerHello(
            worker_id=self.place,
            role=self.home,
            incarnation=self.incarnation,
            version=VERSION,
            model="m",
            spec=scenario.spec,
            tp_size=self.num_ranks,
            num_blocks=self.pool.num_blocks,
            max_model_len=scenario.max_model_len,
            max_num_seqs=scenario.max_num_seqs,
            max_num_batched_tokens=scenario.max_num_batched_tokens,
            kv_address=self.kv_address,
            pid=1,
            transport=self.incoming.name,
            can_change_role=True,
            labels=(("host", self.place),),
        )

    # --- effects ----------------------------------------------------------------------------------------------

    def to_router(self, router_id: str, message: Message) -> None:
        if isinstance(message, Grant):
            check_reservations(self.place, self.pool, self.core.receiver)
            self._rules.check_grant(message)
        session = self._by_router.get(router_id)
        if session is None or session.router_id != router_id:
            session = next((s for s in self.sessions if s.router_id == router_id), None)
            if session is None:
                return
            self._by_router[router_id] = session
        session.send(message)

    def to_peer(self, session: str, message: Message) -> None:
        self._landings.check_opened(message)
        end = self._peers.get(session)
        if end is not None:
            end.send(message)

    def to_target(self, kv_address: str, message: Message) -> None:
        self._links.send(kv_address, message)

    def announce(self) -> None:
        for session in self.sessions:
            session.send_status()

    def rotate(self, generation: int) -> None:
        self.process.after(self.world.scenario.rotation_s, self._on_rotated, generation)

    def _on_rotated(self, generation: int) -> None:
        try:
            regions = tuple(incoming.rotate(generation) for incoming, _, _ in self._ends())
        except TransferError:
            self.core.on_rotated(None)
        else:
            self.core.on_rotated(regions)

    def watch(self, on: bool) -> None:
        """Arrivals come as events."""

    def sum_loan(self, fetch_id: int, blocks: tuple[int, ...], num_thin: int) -> None:
        """On each rank's transfer thread, a turn later."""
        self.process.after(self.world.scenario.turn_s, self._summing.sum_blocks, fetch_id, blocks, num_thin)
        for follower in self.followers:
            follower.sum_blocks(fetch_id, blocks, num_thin)

    def leaving(self) -> Callable[[], object]:
        return lambda: None  # what is said has left

    def stop_step(self) -> None:
        """What computes sees it before its end, or later: this is said again as long as it is so."""
        self._is_stopped = self._stops.random() < 0.5

    def wake(self) -> None:
        if self._batch is None and not self._is_waking:
            self._is_waking = True
            self.process.after(self.world.scenario.wake_s, self._begin_step)

    # --- messages ---------------------------------------------------------------------------------------------

    def _on_router_message(self, router_id: str, message: Message) -> None:
        match message:
            case SetRole():
                with self._rules.keeps_what_was_started():
                    self.core.on_router_message(router_id, message)
            case PrefillTask() | ReserveKV() | LocalTask():
                with self._rules.takes_its_own_work(message):
                    self.core.on_router_message(router_id, message)
            case _:
                self.core.on_router_message(router_id, message)

    def accept(self, end: End, peer: str) -> None:
        """Another worker connects to our handoff address."""
        session = f"{peer}#{next(self._peer_numbers)}"
        self._peers[session] = end
        end.on_message = lambda message: self._on_peer_message(session, message)
        end.on_closed = lambda: self._on_peer_lost(session)

    def _on_peer_message(self, session: str, message: Message) -> None:
        assert isinstance(message, PrefillToDecode | FetcherToLender)
        self.core.on_peer_message(session, message)

    def _on_peer_lost(self, session: str) -> None:
        del self._peers[session]
        self.core.on_peer_lost(session)

    def _on_answer(self, kv_address: str, message: Message) -> None:
        if isinstance(message, LenderToFetcher):
            self.core.on_fetch_answer(message)
        else:
            assert isinstance(message, DecodeToPrefill)
            self._shipping.on_answer(message)

    def _on_target_lost(self, kv_address: str) -> None:
        self._shipping.on_peer_lost(kv_address)
        self.core.on_target_lost(kv_address)

    def _on_arrived(self, rank: int, check: ArrivalCheck | None, message: KVArrived) -> None:
        verdict = Verdict.UNCHECKED
        if check is not None:
            verdict = check.verdict(message)
            self.world.tally.seen[f"arrival {verdict.value}"] += 1
        self._landings.note_told(message, rank)
        self.core.on_arrived(rank, message, verdict)

    # --- time -------------------------------------------------------------------------------------------------

    def _status(self, router_id: str) -> WorkerStatus:
        busy_s = self.world.kernel.now - self._step_began_s if self._batch is not None else 0.0
        return make_status(self.core, router_id, StepFigures(self.engine.num_steps, busy_s, *self._last_step))

    def _tick(self) -> None:
        self.core.tick()
        self._landings.check_leases()
        self._landings.check_fetches()
        if self.core.has_drained:
            self._leave()
        else:
            self.process.after(TICK_S, self._tick)

    def _leave(self) -> None:
        """A drained worker ends: what it has queued leaves first."""
        for session in self.sessions:
            session.send(Goodbye())
            session.close()
        self.world.on_left(self)

    # --- engine -----------------------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        self._is_waking = False
        if self._batch is not None:
            return
        batch = self.core.steps.schedule()
        if batch is None:
            return
        world = self.world
        world.pass_point("step", self)
        self._batch, self._step_began_s, self._is_stopped = batch, world.kernel.now, False
        self._tells_layers = self.core.roles.stepping == "prefill"
        self.core.steps.begin_step(batch)
        self.engine.begin(batch)
        if world.scenario.keeps_states:
            world.tally.seen["rows behind states"] += sum(row.start > 0 for row in batch.rows)
        step_s = world.draw_step_s(batch.num_tokens)
        if self._tells_layers:
            num_layers = self.memory.num_layers
            for layer in range(num_layers - 1):
                self.process.after(step_s * (layer + 1) / num_layers, self._on_layer, layer)
        self.process.after(step_s, self._end_step)
        for request_id in world.poison:
            if any(row.seq.request_id == request_id for row in batch.rows):
                self.process.after(step_s * world.kernel.random.random(), world.poisoned, self, request_id)

    def _on_layer(self, layer: int) -> None:
        self.engine.write_layer(layer)
        self.core.steps.on_layer(layer)
        for follower in self.followers:
            follower.layers.on_layer(layer)

    def _end_step(self) -> None:
        batch = self._batch
        assert batch is not None
        step_s = self.world.kernel.now - self._step_began_s
        num_layers = self.memory.num_layers // 2 if self._is_stopped else self.memory.num_layers
        for layer in range(self.memory.num_layers - 1 if self._tells_layers else 0, num_layers):
            self._on_layer(layer)
        if self._is_stopped:
            self.world.tally.seen["steps stopped"] += 1
            output = stopped_output(batch, step_s)
        else:
            output = self.engine.end(batch, step_s)
        self._batch, self._last_step = None, (step_s, output.num_tokens)
        self.core.steps.complete(batch, output)
        self.core.steps.note_turn(step_s - output.swap_s)
        self.wake()

    # --- invariants -------------------------------------------------------------------------------------------

    def _after_event(self) -> None:
        if self.process.is_dead:
            return
        check_counts(self.place, self.pool)
        check_displaced(self.place, self.pool, self.core.receiver)
        self._rules.check_drain()
        self._num_events += 1
        if self._num_events % _BOOKS_EVERY == 0:
            self.check_books()

    def check_books(self) -> None:
        """Check everything that this worker's books say, against each other."""
        check_holders(self.place, self.pool, self.core.references())
        check_reservations(self.place, self.pool, self.core.receiver)
        try:
            self.core.check()
        except AssertionError as error:
            raise Breach("I1", f"{self.place}: {error!r}") from error

    @property
    def has_handoffs(self) -> bool:
        """Tell whether reservations or shipments have not ended."""
        return any(sender.num_unfinished for sender in self.senders) or self.core.receiver.num_live > 0

    def leftovers(self) -> list[str]:
        """List what is still held; nothing when the worker is at rest."""
        core, found = self.core, []
        if self.pool.num_owned_blocks or self.pool.num_quarantined_blocks:
            found.append(f"{self.pool.num_owned_blocks} blocks, {self.pool.num_quarantined_blocks} in quarantine")
        if not core.is_quiet:
            held = f"{core.roles.num_unfinished} requests, {len(core.fetches)} fetches, {len(core.lending)} loans"
            found.append(held)
        if num_shipments := sum(sender.num_unfinished for sender in self.senders):
            found.append(f"{num_shipments} shipments")
        if core.receiver.num_live:
            live = core.receiver.reservations.live.values()
            found.append(f"reservations: {[reservation.state.value for reservation in live]}")
        missing = [outgoing.agent for _, outgoing, _ in self._ends() if not outgoing.is_there]
        return [f"{self.place} holds {what}" for what in found] + [f"{agent} could not be made" for agent in missing]
