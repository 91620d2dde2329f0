"""Routers learn from steps that are like those that they reckon with, and from no others."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.common.batch import Batch, BatchRow, StepOutput
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.engine.samples import RouterSamples
from kvferry.worker.steps import Steps


class _Roles:
    """Does nothing; `done`: what it was told to."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.done.append(name)


def _row(*draft: int) -> BatchRow:
    seq = Sequence(RequestId("a"), 0, 0, [1, 2, 3], 3, SamplingParams())
    return BatchRow(seq, 1 + len(draft), draft)


@pytest.mark.parametrize(("rows", "num_samples"), [([], 0), ([_row(5)], 0), ([_row()], 1)])
def test_neither_copies_alone_nor_a_step_that_verifies_drafts_is_a_sample(
    rows: list[BatchRow], num_samples: int
) -> None:
    roles: Any = _Roles()
    samples = RouterSamples()
    samples.take("R")
    steps = Steps(roles, None, samples)
    batch = Batch(rows)
    steps.begin_step(batch)
    steps.on_layer(0)
    steps.complete(batch, StepOutput([], 0.01, batch.num_tokens, 0.001))
    steps.note_turn(0.02)
    assert len(samples.take("R")) == num_samples
    assert roles.done == ["begin_step", "on_layer", "complete"]
