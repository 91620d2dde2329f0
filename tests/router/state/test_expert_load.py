"""How evenly experts are chosen, by a worker's reports."""

from __future__ import annotations

import pytest

from kvferry.router.state.expert_load import ExpertLoad, most_uneven
from kvferry.wire.workers import ExpertCounts

FIRST = (ExpertCounts(1, (6, 2), (6, 2)), ExpertCounts(3, (4, 4), (4, 4)))


def test_an_imbalance_is_that_between_the_last_two_reports() -> None:
    load = ExpertLoad.after(None, FIRST)
    assert load.num_choices == 16
    assert load.imbalance == load.rank_imbalance == pytest.approx((6 + 4) / (4 + 4))
    later = (ExpertCounts(1, (6, 12), (11, 7)), ExpertCounts(3, (9, 9), (9, 9)))
    load = ExpertLoad.after(load, later)
    assert load.num_choices == 36
    assert load.imbalance == pytest.approx((10 + 5) / (5 + 5))
    assert load.rank_imbalance == pytest.approx(1.0)


def test_of_several_workers_the_most_uneven_counts() -> None:
    even, uneven = (ExpertLoad.after(None, (ExpertCounts(0, taken),)) for taken in ((3, 3), (6, 2)))
    assert most_uneven([None, even, uneven]) == {"imbalance": pytest.approx(1.5), "rank_imbalance": None}
    assert most_uneven([even, ExpertLoad.after(None, FIRST)]) == {"imbalance": 1.25, "rank_imbalance": 1.25}
    assert most_uneven([None]) is None


def test_without_whole_experts_ranks_have_none() -> None:
    assert ExpertLoad.after(None, (ExpertCounts(0, (0, 0)),)).imbalance == 1.0
    assert ExpertLoad.after(None, (ExpertCounts(0, (5, 0)),)).rank_imbalance is None


@pytest.mark.parametrize("other", [(ExpertCounts(1, (1, 1, 1)), FIRST[1]), FIRST[:1], (ExpertCounts(2, (1, 1)),)])
def test_a_report_of_another_shape_begins_anew(other: tuple[ExpertCounts, ...]) -> None:
    assert ExpertLoad.after(ExpertLoad.after(None, FIRST), other).recent == other
