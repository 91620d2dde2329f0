"""Plans of replicas even out what ranks compute, as far as whole copies can."""

from __future__ import annotations

import random

import pytest

from kvferry.common.errors import ConfigError
from kvferry.models.parts.expert_plan import ExpertPlan, copies_of, read_plan
from kvferry.sizing.experts import plan_experts, planned_imbalance


def test_the_most_chosen_get_the_copies() -> None:
    plan = plan_experts({0: [100, 1, 1, 1, 60, 1, 1, 1]}, 4, 4)
    copies = copies_of(plan.held(0))
    assert (copies[0], copies[4]) == (4, 2) and copies.total() == 12
    assert {len(own) for own in plan.held(0)} == {3}


@pytest.mark.parametrize("seed", range(20))
def test_any_counts_make_a_plan_that_loads_and_evens_out(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = random.Random(seed)
    ranks = rng.choice([2, 3, 4, 8])
    experts = ranks * rng.randint(1, 8)
    replicas = ranks * rng.randint(0, experts * (ranks - 1) // ranks)
    taken = {layer: [int(rng.paretovariate(1)) for _ in range(experts)] for layer in (1, 3)}
    plan = plan_experts(taken, ranks, replicas)
    file = tmp_path_factory.mktemp("plans") / "plan"
    file.write_text(plan.text())
    assert read_plan(file, num_ranks=ranks, num_experts=experts, sparse_layers=(1, 3)) == plan
    for layer in taken:
        assert {len(own) for own in plan.held(layer)} == {(experts + replicas) // ranks}
    if replicas == experts * (ranks - 1):
        assert planned_imbalance(taken, plan) == pytest.approx(1.0)


def test_a_skew_is_evened_out() -> None:
    taken = {0: [50, 30, 9, 1, 1, 1, 4, 4]}
    before = planned_imbalance(taken, ExpertPlan(8, 2))
    assert before == pytest.approx(1.8)
    assert planned_imbalance(taken, plan_experts(taken, 2, 2)) < 1.05


@pytest.mark.parametrize(
    ("replicas", "message"), [(3, "8 experts and 3 replicas .* over 2 ranks; use 2"), (10, "10 are more than 8")]
)
def test_what_ranks_cannot_hold_evenly_is_refused(replicas: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_experts({0: [1] * 8}, 2, replicas)
