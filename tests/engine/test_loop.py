"""The engine's thread: what each step was is told, and who else has the lock."""

from __future__ import annotations

import threading

from kvferry.common.batch import Batch, BatchRow, RowOutput, StepOutput
from kvferry.common.messages import StepSample
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.engine.loop import EngineLoop


class _Role:
    """Three steps of one sequence: a prompt, then two tokens."""

    def __init__(self, is_over: threading.Event) -> None:
        self.sequence = Sequence(RequestId("r"), 0, 0, [1] * 8, 8, SamplingParams())
        self.num_left = 3
        self.is_over = is_over

    def schedule(self) -> Batch | None:
        if not self.num_left:
            self.is_over.set()
            return None
        self.num_left -= 1
        return Batch([BatchRow(self.sequence, self.sequence.num_uncomputed_tokens)])

    def begin_step(self, batch: Batch) -> None:
        pass

    def on_layer(self, layer: int) -> None:
        pass

    def complete(self, batch: Batch, output: StepOutput) -> None:
        self.sequence.num_computed_tokens = self.sequence.num_tokens
        self.sequence.token_ids.append(2)


def test_each_step_is_told_as_it_was_before_its_tokens_counted() -> None:
    is_over, lock, told = threading.Event(), threading.Condition(), list[StepSample]()

    def on_step(sample: StepSample) -> None:
        assert lock._is_owned()  # type: ignore[attr-defined]  # of this thread
        told.append(sample)

    def step(batch: Batch, on_layer: object) -> StepOutput:
        return StepOutput([RowOutput(()) for _ in batch.rows], 0.0, batch.num_tokens)

    loop = EngineLoop(_Role(is_over), step, lambda error: None, lock=lock, on_step=on_step)
    loop.start()
    assert is_over.wait(10)
    loop.stop()
    assert [(s.prefill_tokens, s.prefill_pairs, s.decode_rows, s.decode_context) for s in told] == [
        (8, 32, 0, 0),
        (0, 0, 1, 9),
        (0, 0, 1, 10),
    ]
    assert all(sample.step_s > 0 for sample in told) and loop.lock is lock
