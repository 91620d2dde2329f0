"""Plans of experts are read as they were written, and mistakes in them are told by layer and rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvferry.common.errors import ConfigError
from kvferry.models.parts.expert_plan import ExpertPlan, even_split, read_plan

PLAN = ExpertPlan(4, 2, {1: ((0, 1, 3), (1, 2, 3))})


def _read(path: Path) -> ExpertPlan:
    return read_plan(path, num_ranks=2, num_experts=4, sparse_layers=(1, 2))


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "plan").write_text(PLAN.text())
    plan = _read(tmp_path / "plan")
    assert plan == PLAN
    assert plan.held(1) == ((0, 1, 3), (1, 2, 3)) and plan.held(2) == even_split(4, 2) == ((0, 1), (2, 3))
    assert len({plan.name, ExpertPlan(4, 2).name, ExpertPlan(4, 2, {1: ((0, 1), (2, 3))}).name}) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ranks": 4}, "is for 4 ranks, tensor_parallel_size is 2"),
        ({"experts": 8}, "is for 8 experts, the model's layers have 4"),
        ({"layers": {"0": [[0, 1], [2, 3]]}}, "layer 0: the model has no experts there"),
        ({"layers": {"1": [[0, 1, 2, 3]]}}, "layer 1: it needs a list of experts for each of 2 ranks"),
        ({"layers": {"1": [[0, 1], [2, 4]]}}, "layer 1: rank 1: 4 is no expert from 0 to 3"),
        ({"layers": {"1": [[0, 1], [2, True]]}}, "layer 1: rank 1: True is no expert"),
        ({"layers": {"1": [[0, 1, 0], [2, 3]]}}, "layer 1: rank 0: expert 0 stands there twice"),
        ({"layers": {"1": [[0, 1, 2, 3], []]}}, "layer 1: rank 1 holds none"),
        ({"layers": {"2": [[0, 1], [1, 3]]}}, "layer 2: no rank holds expert 2"),
        ({"layers": []}, "layers: not by number"),
        ({"more": 1}, "is no plan: it needs ranks, experts and layers"),
    ],
)
def test_mistakes_are_told_where_they_are(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    (tmp_path / "plan").write_text(json.dumps(json.loads(PLAN.text()) | fields))
    with pytest.raises(ConfigError, match=message):
        _read(tmp_path / "plan")


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "plan").write_text("{")
    for name in ("plan", "none"):
        with pytest.raises(ConfigError, match=f"expert_plan: .*{name} cannot be read"):
            _read(tmp_path / name)


def test_results_of_an_exchange_have_a_name_of_their_own() -> None:
    """They are added up in another order: exact workers pair with none whose name differs."""
    plans = [ExpertPlan(4, 2), ExpertPlan(4, 2, {0: ((0, 1, 2), (1, 2, 3))})]
    names = [replace(plan, is_exchanged=is_exchanged).name for plan in plans for is_exchanged in (False, True)]
    assert names[:2] == ["ep", "ep exchanged"] and len(set(names)) == 4
    assert replace(plans[1], is_exchanged=True).text() == plans[1].text(), "a file is of either"
