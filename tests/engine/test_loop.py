"""The engine's thread: its turns, what it says of them, and who else has the lock."""

from __future__ import annotations

import threading

from kvferry.common.batch import Batch, BatchRow, RowOutput, StepOutput
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.engine.loop import EngineLoop
from kvferry.tests.fake_clock import FakeClock


class _Role:
    """Three steps of one sequence: a prompt, then two tokens."""

    def __init__(self, is_over: threading.Event, lock: threading.Condition) -> None:
        self.sequence = Sequence(RequestId("r"), 0, 0, [1] * 8, 8, SamplingParams())
        self.num_left = 3
        self.is_over = is_over
        self.calls: list[str] = []
        self.turns_s: list[float] = []
        self._lock = lock

    def _is_owned(self) -> bool:
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]  # by this thread

    def schedule(self) -> Batch | None:
        assert self._is_owned()
        if not self.num_left:
            self.is_over.set()
            return None
        self.num_left -= 1
        self.calls.append("schedule")
        return Batch([BatchRow(self.sequence, self.sequence.num_uncomputed_tokens)])

    def begin_step(self, batch: Batch) -> None:
        assert not self._is_owned()
        self.calls.append("begin_step")

    def on_layer(self, layer: int) -> None:
        pass

    def complete(self, batch: Batch, output: StepOutput) -> None:
        assert self._is_owned()
        self.calls.append("complete")
        self.sequence.num_computed_tokens = self.sequence.num_tokens
        self.sequence.token_ids.append(2)

    def note_turn(self, turn_s: float) -> None:
        assert self._is_owned()
        self.calls.append("note_turn")
        self.turns_s.append(turn_s)


def test_a_turn_is_told_when_its_step_is_complete() -> None:
    is_over, lock = threading.Event(), threading.Condition()
    role = _Role(is_over, lock)

    def step(batch: Batch, on_layer: object) -> StepOutput:
        assert loop.figures().busy_for_s > 0
        return StepOutput([RowOutput(()) for _ in batch.rows], 0.25, batch.num_tokens)

    loop = EngineLoop(role, step, lambda error: None, lock=lock, prepare=lambda: role.calls.append("prepare"))
    loop.start()
    assert is_over.wait(10)
    loop.stop()
    assert role.calls == ["prepare", *["schedule", "begin_step", "complete", "note_turn"] * 3]
    assert all(turn_s > 0 for turn_s in role.turns_s) and loop.lock is lock
    figures = loop.figures()
    assert (figures.steps, figures.busy_for_s, figures.step_s, figures.step_tokens) == (3, 0.0, 0.25, 1)


def test_a_step_is_not_older_for_a_standstill_of_its_process() -> None:
    clock, is_over, lock = FakeClock(), threading.Event(), threading.Condition()
    role, ages_s = _Role(is_over, lock), []

    def step(batch: Batch, on_layer: object) -> StepOutput:
        for seconds in (0.5, 5.0, 0.25):
            clock.advance(seconds)
            ages_s.append(loop.busy_for_s)
        return StepOutput([RowOutput(()) for _ in batch.rows], 0.25, batch.num_tokens)

    loop = EngineLoop(role, step, lambda error: None, lock=lock, clock=clock)
    loop.start()
    assert is_over.wait(10)
    loop.stop()
    assert ages_s == [0.5, 0.5, 0.75] * 3
