"""The engine's thread: its turns, what it says of them, and who else has the lock."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

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


def test_a_turn_is_told_when_its_step_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of blocks left out, and what the loop does when it has been told."""
    is_over, lock, now_s = threading.Event(), threading.Condition(), [0.0]
    role = _Role(is_over, lock)
    monkeypatch.setattr("kvferry.engine.loop.time", SimpleNamespace(perf_counter=lambda: now_s[0]))

    def step(batch: Batch, on_layer: object) -> StepOutput:
        assert loop.figures().busy_for_s > 0
        now_s[0] += 2.0
        return StepOutput([RowOutput(()) for _ in batch.rows], 0.25, batch.num_tokens, swap_s=0.5)

    def note_turn(turn_s: float) -> None:
        _Role.note_turn(role, turn_s)
        now_s[0] += 7.0

    monkeypatch.setattr(role, "note_turn", note_turn)

    loop = EngineLoop(role, step, lambda error: None, lock=lock, prepare=lambda: role.calls.append("prepare"))
    loop.start()
    assert is_over.wait(10)
    loop.stop()
    assert not loop._thread.is_alive()
    assert role.calls == ["prepare", *["schedule", "begin_step", "complete", "note_turn"] * 3]
    assert role.turns_s == [1.5] * 3 and loop.lock is lock
    figures = loop.figures()
    assert (figures.steps, figures.busy_for_s, figures.step_s, figures.step_tokens) == (3, 0.0, 0.25, 1)


def test_an_error_ends_the_loop_and_reaches_its_owner() -> None:
    is_over, lock, failures = threading.Event(), threading.Condition(), list[BaseException]()

    def step(batch: Batch, on_layer: object) -> StepOutput:
        raise KeyError("a step's")

    def fail(error: BaseException) -> None:
        failures.append(error)
        is_over.set()

    loop = EngineLoop(_Role(is_over, lock), step, fail, lock=lock)
    loop.stop()  # before it was started
    loop = EngineLoop(_Role(is_over, lock), step, fail, lock=lock)
    loop.start()
    assert is_over.wait(10)
    loop.stop()
    assert [repr(error) for error in failures] == ['KeyError("a step\'s")'] and loop.figures().steps == 0


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
