"""Workers: the real role and scheduler around a simulated engine, memory and transfer agent.

This and its two subclasses are the glue that `worker/` is in a process: `process.py`, `decode_side.py` and
`prefill_side.py`. One event is what one thread does while it holds the lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry.common.batch import Batch
from kvferry.common.messages import Drain, Goodbye, Message, WorkerHello, WorkerStatus
from kvferry.decode.role import DecodeRole
from kvferry.kvcache.blocks import BlockPool
from kvferry.prefill.role import PrefillRole

from .agent import Agent
from .engine import Engine, Memory
from .invariants import check_counts, check_holders
from .kernel import Process, ProcessClock
from .sessions import RouterSession

if TYPE_CHECKING:
    from .world import World

TICK_S = 0.1
IDLE_TICKS = 10
VERSION = "sim"
_BOOKS_EVERY = 64  # events of a worker between two looks at all of its books


class Worker:
    """One life of a worker process. `role` is set by the subclass."""

    role: DecodeRole | PrefillRole
    kv_address = ""
    tells_layers = False  # its layers are told one by one, as time passes

    def __init__(self, world: World, place: str, incarnation: int, num_blocks: int) -> None:
        kernel, scenario = world.kernel, world.scenario
        self.world = world
        self.place = place
        self.incarnation = incarnation
        self.process = Process(kernel, place, place, self._after_event)
        self.clock = ProcessClock(kernel, kernel.random.uniform(1, 1000), 1 + kernel.random.uniform(-1e-3, 1e-3))
        self.pool: BlockPool = world.parts.pool(num_blocks, scenario.spec.block_size)
        self.memory = Memory(scenario.spec.num_layers, num_blocks, scenario.spec.block_size)
        self.engine = Engine(place, self.memory, self.pool, world.oracles)
        self.agent = Agent(
            f"{place}.{incarnation:x}.0.0", place, world.fabric, self.process, self.memory, scenario.spec.page_bytes()
        )
        self.agent.pass_point = lambda point: world.pass_point(point, self)
        self.is_leaving = False
        self.sessions: list[RouterSession] = []
        self._by_router: dict[str, RouterSession] = {}
        self._batch: Batch | None = None  # in the step that computes now
        self._is_waking = False
        self._step_began_s = 0.0
        self._last_step = (0.0, 0)
        self._num_ticks = 0
        self._num_heartbeats = 0
        self._num_events = 0
        self._drains_until: float | None = None
        self._was_busy = False

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
                )
            )
        self.process.after(TICK_S * self.world.kernel.random.random(), self._tick)

    # --- routers --------------------------------------------------------------------------------------------

    def _hello(self) -> WorkerHello:
        scenario = self.world.scenario
        return WorkerHello(
            worker_id=self.place,
            role=self.role.name,
            incarnation=self.incarnation,
            version=VERSION,
            model="m",
            spec=scenario.spec,
            tp_size=1,
            num_blocks=self.pool.num_blocks,
            max_model_len=scenario.max_model_len,
            max_num_seqs=scenario.max_num_seqs,
            max_num_batched_tokens=scenario.max_num_batched_tokens,
            kv_address=self.kv_address,
            pid=1,
            transport=self.agent.name,
        )

    def _status(self) -> WorkerStatus:
        self._num_heartbeats += 1
        role, pool, kernel = self.role, self.pool, self.world.kernel
        return WorkerStatus(
            seq=self._num_heartbeats,
            state="draining" if role.draining else "ready",
            num_running=role.scheduler.num_running,
            num_waiting=role.scheduler.num_waiting,
            waiting_tokens=role.scheduler.waiting_tokens,
            num_free_blocks=pool.num_free_blocks,
            num_cached_blocks=pool.num_cached_blocks,
            num_granted_blocks=role.num_granted_blocks,
            num_quarantined_blocks=pool.num_quarantined_blocks,
            num_blocks=pool.num_blocks,
            steps=self.engine.num_steps,
            busy_for_s=kernel.now - self._step_began_s if self._batch is not None else 0.0,
            step_s=self._last_step[0],
            step_tokens=self._last_step[1],
            num_preemptions=role.scheduler.num_preemptions,
        )

    def to_router(self, router_id: str, message: Message) -> None:
        session = self._by_router.get(router_id)
        if session is None or session.router_id != router_id:
            session = next((s for s in self.sessions if s.router_id == router_id), None)
            if session is None:
                return
            self._by_router[router_id] = session
        session.send(message)

    def _on_router_message(self, router_id: str, message: Message) -> None:
        if isinstance(message, Drain):
            self._drains_until = self.clock.now() + message.deadline_s
            self._drain()
        else:
            self.role.on_router_message(router_id, message)
        self.after_change()

    def _drain(self) -> None:
        """Take nothing new, and say so at once."""
        self.role.draining = True
        self._send_status()

    def _send_status(self) -> None:
        status = self._status()
        for session in self.sessions:
            session.send(status)

    @property
    def num_unfinished(self) -> int:
        """What a drain waits for."""
        return self.role.num_unfinished

    def _on_router_lost(self, router_id: str) -> None:
        self.role.on_router_lost(router_id)
        self.after_change()

    # --- time -----------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self.role.tick()
        self._on_tick()
        self.after_change()
        is_busy = self.role.num_unfinished > 0
        if is_busy or self._was_busy or self._num_ticks % IDLE_TICKS == 0:
            self._send_status()
        self._was_busy = is_busy
        self._num_ticks += 1
        until = self._drains_until
        if until is not None and (not self.num_unfinished or self.clock.now() >= until):
            self._leave()
        else:
            self.process.after(TICK_S, self._tick)

    def _on_tick(self) -> None:
        """What else is looked at ten times a second."""

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
        batch = self.role.schedule()
        if batch is None:
            return
        world = self.world
        world.pass_point("step", self)
        self._batch, self._step_began_s = batch, world.kernel.now
        self.role.begin_step(batch)
        self.engine.begin(batch)
        step_s = world.draw_step_s(batch.num_tokens)
        if self.tells_layers:
            num_layers = self.memory.num_layers
            for layer in range(num_layers - 1):
                self.process.after(step_s * (layer + 1) / num_layers, self._on_layer, layer)
        self.process.after(step_s, self._end_step)
        for request_id in world.poison:
            if any(row.seq.request_id == request_id for row in batch.rows):
                self.process.after(step_s * world.kernel.random.random(), world.poisoned, self, request_id)

    def _on_layer(self, layer: int) -> None:
        self.engine.write_layer(layer)
        self.role.on_layer(layer)

    def _end_step(self) -> None:
        batch = self._batch
        assert batch is not None
        for layer in range(self.memory.num_layers - 1 if self.tells_layers else 0, self.memory.num_layers):
            self._on_layer(layer)
        step_s = self.world.kernel.now - self._step_began_s
        output = self.engine.end(batch, step_s)
        self._batch, self._last_step = None, (step_s, output.num_tokens)
        self.role.complete(batch, output)
        self.after_change()

    # --- invariants -----------------------------------------------------------------------------------------

    def _after_event(self) -> None:
        if self.process.is_dead:
            return
        check_counts(self.place, self.pool)
        self._num_events += 1
        if self._num_events % _BOOKS_EVERY == 0:
            self.check_books()

    def check_books(self) -> None:
        """Everything that this worker's books say, against each other."""
        check_holders(self.place, self.pool, self.holders())

    def holders(self) -> list[list[int]]:
        raise NotImplementedError

    @property
    def has_handoffs(self) -> bool:
        """Reservations or shipments that have not ended."""
        raise NotImplementedError

    def leftovers(self) -> list[str]:
        """What is still held; empty when the worker is at rest."""
        found = []
        if self.pool.num_owned_blocks or self.pool.num_quarantined_blocks:
            found.append(f"{self.pool.num_owned_blocks} blocks, {self.pool.num_quarantined_blocks} in quarantine")
        if not self.role.is_quiet:
            found.append(f"{self.role.num_unfinished} requests")
        return [f"{self.place} holds {what}" for what in found]
