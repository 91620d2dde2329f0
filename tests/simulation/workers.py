"""Workers: both real roles and their schedulers around a simulated engine, memory and transfer agents.

This and its two sides are the glue that `worker/` is in a process: `worker.py`, `process.py`, `decode_side.py` and
`prefill_side.py`. One event is what one thread does while it holds the lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from kvferry.common.batch import Batch
from kvferry.common.messages import (
    Drain,
    Goodbye,
    Grant,
    LocalTask,
    Message,
    PrefillTask,
    ReserveKV,
    SetRole,
    WorkerHello,
    WorkerStatus,
)
from kvferry.engine.samples import RouterSamples, step_sample
from kvferry.kvcache.blocks import BlockPool
from kvferry.kvcache.journal import open_journal
from kvferry.kvcache.prefix_cache import PrefixCache
from kvferry.worker.roles import RoleName, RolePair
from kvferry.worker.shares import RouterShares

from .agent import Agent
from .decode_side import DecodeSide
from .engine import Engine, Memory
from .invariants import check_counts, check_holders, check_reservations
from .kernel import Process, ProcessClock
from .prefill_side import PrefillSide
from .role_rules import RoleRules
from .sessions import VERSION, RouterSession

if TYPE_CHECKING:
    from .world import World

TICK_S = 0.1
IDLE_TICKS = 10
_BOOKS_EVERY = 64  # events of a worker between two looks at all of its books


class Worker:
    """One life of a worker process. `home`: the role that it starts with, in each of its lives."""

    def __init__(self, world: World, place: str, incarnation: int, num_blocks: int, home: RoleName) -> None:
        kernel, scenario = world.kernel, world.scenario
        self.world = world
        self.place = place
        self.incarnation = incarnation
        self.home: RoleName = home
        self.process = Process(kernel, place, place, self._after_event)
        self.clock = ProcessClock(kernel, kernel.random.uniform(1, 1000), 1 + kernel.random.uniform(-1e-3, 1e-3))
        self.pool: BlockPool = world.parts.pool(num_blocks, scenario.spec.block_size)
        self.cache = PrefixCache(self.pool)
        self.memory = Memory(scenario.spec.num_layers, num_blocks, scenario.spec.block_size)
        self.engine = Engine(place, self.memory, self.pool, world.oracles)
        self.incoming = self._agent(f"{place}.{incarnation:x}.0.0")
        self.outgoing = self._agent(f"{place}.{incarnation:x}.out.0.0")
        self.is_leaving = False
        self.sessions: list[RouterSession] = []
        self._by_router: dict[str, RouterSession] = {}
        self._batch: Batch | None = None  # in the step that computes now
        self._tells_layers = False  # that step ships: its layers are told one by one, as time passes
        self._is_waking = False
        self._step_began_s = 0.0
        self._last_step = (0.0, 0)
        self._num_ticks = 0
        self._num_heartbeats = 0
        self._num_events = 0
        self._drains_until: float | None = None
        self._was_busy = False
        self._samples = RouterSamples()
        self._shares = RouterShares(self.clock)
        self._journal = open_journal(self.pool, self.cache)
        self.prefill = PrefillSide(world, self)
        self.decode = DecodeSide(world, self)
        self.roles: RolePair = world.parts.role_pair(self.prefill.role, self.decode.role, self.pool, home)
        self._rules = RoleRules(self)
        self._start()

    def _agent(self, name: str) -> Agent:
        world, spec = self.world, self.world.scenario.spec
        agent = Agent(name, self.place, world.fabric, self.process, self.memory, spec.page_bytes())
        agent.pass_point = lambda point: world.pass_point(point, self)
        return agent

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
                    on_lost=self._on_router_lost,
                    on_joined=self._journal.router_joined,
                )
            )
        self.process.after(TICK_S * self.world.kernel.random.random(), self._tick)

    # --- routers --------------------------------------------------------------------------------------------

    def _hello(self) -> WorkerHello:
        scenario = self.world.scenario
        return WorkerHello(
            worker_id=self.place,
            role=self.home,
            incarnation=self.incarnation,
            version=VERSION,
            model="m",
            spec=scenario.spec,
            tp_size=1,
            num_blocks=self.pool.num_blocks,
            max_model_len=scenario.max_model_len,
            max_num_seqs=scenario.max_num_seqs,
            max_num_batched_tokens=scenario.max_num_batched_tokens,
            kv_address=self.decode.kv_address,
            pid=1,
            transport=self.incoming.name,
            can_change_role=True,
            labels=(("host", self.place),),
        )

    def _status(self, router_id: str) -> WorkerStatus:
        self._num_heartbeats += 1
        roles, pool, kernel = self.roles, self.pool, self.world.kernel
        return WorkerStatus(
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
            steps=self.engine.num_steps,
            busy_for_s=kernel.now - self._step_began_s if self._batch is not None else 0.0,
            step_s=self._last_step[0],
            step_tokens=self._last_step[1],
            num_preemptions=roles.num_preemptions,
            prefix_queries=roles.prefix_queries,
            prefix_hits=roles.prefix_hits,
            role=roles.active_role,
            decode_context=roles.decode.scheduler.num_context_tokens,
            samples=self._samples.take(router_id),
            share=self._shares.share(router_id, roles.routers),
        )

    def to_router(self, router_id: str, message: Message) -> None:
        if isinstance(message, Grant):
            check_reservations(self.place, self.pool, self.decode.receiver)
            self._rules.check_grant(message)
        session = self._by_router.get(router_id)
        if session is None or session.router_id != router_id:
            session = next((s for s in self.sessions if s.router_id == router_id), None)
            if session is None:
                return
            self._by_router[router_id] = session
        session.send(message)

    def _on_router_message(self, router_id: str, message: Message) -> None:
        match message:
            case Drain():
                self._drains_until = self.clock.now() + message.deadline_s
                self.roles.draining = True
                self._send_status()
            case SetRole():
                self._set_role(message.role)
            case PrefillTask() | ReserveKV() | LocalTask():
                self._shares.note_work(router_id)
                with self._rules.takes_its_own_work(message):
                    self.roles.on_router_message(router_id, message)
            case _:
                self.roles.on_router_message(router_id, message)
        self.after_change()

    def _set_role(self, role: str) -> None:
        """Change the active role, and say so at once."""
        with self._rules.keeps_what_was_started():
            self.roles.set_role("prefill" if role == "prefill" else "decode")
        self._send_status()

    def _send_status(self) -> None:
        for session in self.sessions:
            session.send_status()

    @property
    def num_unfinished(self) -> int:
        """What a drain waits for."""
        return self.prefill.num_unfinished + self.decode.role.num_unfinished

    @property
    def is_draining(self) -> bool:
        """It was told to end."""
        return self._drains_until is not None

    def _on_router_lost(self, router_id: str) -> None:
        self._samples.forget(router_id)
        self._journal.router_left(router_id)
        self.roles.on_router_lost(router_id)
        self.after_change()

    # --- time -----------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self.roles.tick()
        self.decode.check_leases()
        self.after_change()
        for router_id, change in list(self._journal.drain()):
            self.to_router(router_id, change)
        is_busy = self.roles.num_unfinished > 0
        if is_busy or self._was_busy or self._num_ticks % IDLE_TICKS == 0:
            self._send_status()
        self._was_busy = is_busy
        self._num_ticks += 1
        until = self._drains_until
        if until is not None and (not self.num_unfinished or self.clock.now() >= until):
            self._leave()
        else:
            self.process.after(TICK_S, self._tick)

    def _leave(self) -> None:
        """A drained worker ends: what it has queued leaves first."""
        self.is_leaving = True
        for session in self.sessions:
            session.send(Goodbye())
            session.close()
        self.world.on_left(self)

    # --- engine ---------------------------------------------------------------------------------------------

    def after_change(self) -> None:
        """There may be work."""
        if self._batch is None and not self._is_waking:
            self._is_waking = True
            self.process.after(self.world.scenario.wake_s, self._begin_step)

    def _begin_step(self) -> None:
        self._is_waking = False
        if self._batch is not None:
            return
        batch = self.roles.schedule()
        if batch is None:
            return
        world = self.world
        world.pass_point("step", self)
        self._batch, self._step_began_s = batch, world.kernel.now
        self._tells_layers = self.roles.stepping == "prefill"
        self.roles.begin_step(batch)
        self.engine.begin(batch)
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
        self.roles.on_layer(layer)

    def _end_step(self) -> None:
        batch = self._batch
        assert batch is not None
        for layer in range(self.memory.num_layers - 1 if self._tells_layers else 0, self.memory.num_layers):
            self._on_layer(layer)
        step_s = self.world.kernel.now - self._step_began_s
        output = self.engine.end(batch, step_s)
        self._batch, self._last_step = None, (step_s, output.num_tokens)
        sample = step_sample(batch)  # before its tokens are counted as computed
        self.roles.complete(batch, output)
        if batch.rows:
            self._samples.add(msgspec.structs.replace(sample, step_s=step_s - output.swap_s))
        self.after_change()

    # --- invariants -----------------------------------------------------------------------------------------

    def _after_event(self) -> None:
        if self.process.is_dead:
            return
        check_counts(self.place, self.pool)
        self._rules.check_drain()
        self._num_events += 1
        if self._num_events % _BOOKS_EVERY == 0:
            self.check_books()

    def check_books(self) -> None:
        """Everything that this worker's books say, against each other."""
        check_holders(self.place, self.pool, self.roles.references())
        self.decode.check_books()

    @property
    def has_handoffs(self) -> bool:
        """Reservations or shipments that have not ended."""
        return self.prefill.has_handoffs or self.decode.has_handoffs

    def leftovers(self) -> list[str]:
        """What is still held; empty when the worker is at rest."""
        found = []
        if self.pool.num_owned_blocks or self.pool.num_quarantined_blocks:
            found.append(f"{self.pool.num_owned_blocks} blocks, {self.pool.num_quarantined_blocks} in quarantine")
        if not self.roles.is_quiet:
            found.append(f"{self.roles.num_unfinished} requests")
        if self.prefill.has_handoffs:
            found.append(f"{self.prefill.sender.num_unfinished} shipments")
        if self.decode.has_handoffs:
            live = self.decode.receiver.reservations.live.values()
            found.append(f"reservations: {[reservation.state.value for reservation in live]}")
        return [f"{self.place} holds {what}" for what in found]
