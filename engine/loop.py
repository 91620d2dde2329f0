"""The engine's thread: schedule under the lock, compute outside it, hand out the result under it again.

One lock guards a worker's scheduler, block pool and reservations. The network thread takes it for each message,
the transfer thread for each arrival; neither waits for a step, because the engine computes without it.

    loop:  [lock] role.schedule() -> Batch      nothing to do: wait for `wake`
                  role.begin_step(batch)
                  engine.step(batch, role.on_layer)
           [lock] role.complete(batch, output), role.note_turn(seconds)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from ..common.batch import Batch, StepOutput
from ..common.clock import Clock, OwnTime, SystemClock


class StepRole(Protocol):
    """A role, as the loop drives it."""

    def schedule(self) -> Batch | None:
        """Return the next step's work; None when there is none. Called with the lock held."""
        ...

    def begin_step(self, batch: Batch) -> None:
        """Prepare what the step needs, right before it and without the lock."""
        ...

    def on_layer(self, layer: int) -> None:
        """Take in that a layer's keys and values of this step are in the pages. Without the lock."""
        ...

    def complete(self, batch: Batch, output: StepOutput) -> None:
        """Take in the finished step. Called with the lock held."""
        ...

    def note_turn(self, turn_s: float) -> None:
        """Learn how long that step kept the next one waiting, copies of blocks left out. Called with the lock held."""
        ...


class StepFigures(Struct, frozen=True):
    """Figures of an engine's steps, under the names that `WorkerStatus` gives them."""

    steps: int  # finished since start
    busy_for_s: float  # since the running step began; 0 when none runs
    step_s: float  # of the last step
    step_tokens: int


StepFunction = Callable[[Batch, Callable[[int], None]], StepOutput]


class EngineLoop:
    """Owns the thread and the lock. An exception in a step ends the loop and reaches `on_failure`."""

    def __init__(
        self,
        role: StepRole,
        step: StepFunction,
        on_failure: Callable[[BaseException], None],
        *,
        lock: threading.Condition | None = None,
        prepare: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
    ) -> None:
        """`lock`: one that others have already. `prepare` runs first on the thread, which has GPU state of its own.

        `clock`: what a running step's age is taken by.
        """
        self._prepare = prepare
        self._own_time = OwnTime(clock if clock is not None else SystemClock())
        self.lock = lock if lock is not None else threading.Condition()
        self._role = role
        self._step = step
        self._on_failure = on_failure
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._turn_began = 0.0
        self._step_began: float | None = None
        self.num_steps = 0
        self.last_step_s = 0.0
        self.last_step_tokens = 0

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Wake the loop, for which there may be work. The caller holds the lock."""
        self.lock.notify()

    def stop(self) -> None:
        """End after the running step; waits for it."""
        with self.lock:
            self._stopping = True
            self.lock.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def busy_for_s(self) -> float:
        """Return the seconds since the running step began, but for those in which this process stood still.

        0 when none runs. To be asked several times a second, else the process counts as standing still.
        """
        began, now = self._step_began, self._own_time.now()
        return 0.0 if began is None else max(0.0, now - began)

    def figures(self) -> StepFigures:
        return StepFigures(self.num_steps, self.busy_for_s, self.last_step_s, self.last_step_tokens)

    def _run(self) -> None:
        try:
            self._prepare()
            while (batch := self._next()) is not None:
                self._step_began = self._own_time.now()
                self._role.begin_step(batch)
                output = self._step(batch, self._role.on_layer)
                self.last_step_s, self.last_step_tokens = output.step_s, output.num_tokens
                with self.lock:
                    self._role.complete(batch, output)
                    self._role.note_turn(time.perf_counter() - self._turn_began - output.swap_s)
                self.num_steps += 1
                self._step_began = None
        except BaseException as error:  # its owner decides: the thread must not die in silence
            self._on_failure(error)

    def _next(self) -> Batch | None:
        with self.lock:
            while not self._stopping:
                self._turn_began = time.perf_counter()
                batch = self._role.schedule()
                if batch is not None:
                    return batch
                self.lock.wait()
            return None
