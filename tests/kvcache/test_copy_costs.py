"""Copying or computing: what steps have shown decides, and what they have not shown yet is tried."""

from __future__ import annotations

import pytest

from kvferry.common.batch import Batch, BatchRow, StepOutput
from kvferry.kvcache.copy_costs import CopyCosts

from ..decode.tagged import TaggedScheduler


def test_copying_pays_where_it_takes_less_time_than_the_tokens() -> None:
    costs = CopyCosts(block_s=0.001, token_s=0.0002)
    assert costs.copying_pays(20, 160)
    assert not costs.copying_pays(40, 160)
    assert not costs.copying_pays(20, 100), "as long is not sooner"


def test_what_is_not_measured_yet_is_tried() -> None:
    assert CopyCosts(None, 1e-9).copying_pays(2, 1) and CopyCosts(9.0, None).copying_pays(2, 1)


def test_costs_are_learned_from_copies_and_from_steps_that_are_mostly_chunks() -> None:
    bench = TaggedScheduler(16)
    decode, chunk = bench.sequence("d", [1]), bench.sequence("c", list(range(12)))
    costs = CopyCosts()
    costs.observe(Batch([BatchRow(decode, 1)]), StepOutput([], 0.5, 1))
    assert (costs.block_s, costs.token_s) == (None, None)
    costs.observe(Batch([BatchRow(decode, 1), BatchRow(chunk, 9)], swap_out=[(0, 0)]), StepOutput([], 0.52, 10, 0.02))
    assert costs.block_s == pytest.approx(0.02) and costs.token_s == pytest.approx(0.05)
    costs.observe(Batch([], swap_in=[(0, 0), (1, 1)]), StepOutput([], 0.08, 0, 0.08))
    assert costs.block_s == pytest.approx(0.02 + 0.3 * 0.02)
