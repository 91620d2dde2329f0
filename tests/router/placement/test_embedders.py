"""A prompt that is embedded goes to one worker: a prefill worker, or a decode worker where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvferry.common.router_config import RouterConfig
from kvferry.router.placement import make_policy
from kvferry.router.placement.candidates import candidates
from kvferry.router.placement.policy import RoutingPolicy
from kvferry.router.state.demand import Demand, Lack, Placement, Reason, Wait
from kvferry.router.state.predictor import Predictor

from ..fleet import config
from .test_policy import D0, D1, P0, P1, view

DEMAND = Demand(num_prompt_tokens=20, num_tokens=20, max_num_tokens=20, num_choices=1, is_embedding=True)
every_policy = pytest.mark.parametrize("name", ["slo", "least_loaded", "kv_cost", "round_robin"])


def _policy(name: str, **changes: object) -> RoutingPolicy:
    router: RouterConfig = config(policy=name, **changes)
    return make_policy(router, Predictor())


@every_policy
def test_the_prefill_worker_with_the_least_to_do_takes_it_alone(name: str) -> None:
    busy = replace(P0, ahead_tokens=30, unstarted_tokens=30, num_bound=1, backlog_s=0.3, s_per_token=0.01)
    placement = _policy(name).place(view(busy, P1, D0), DEMAND)
    assert isinstance(placement, Placement)
    if name != "round_robin":
        assert placement.decode_worker == "p-1"
    assert placement.prefill_worker is None and placement.reason is Reason.EMBEDDING
    assert placement.computing_worker == placement.decode_worker


@every_policy
def test_no_decode_worker_is_needed(name: str) -> None:
    assert isinstance(_policy(name).place(view(P0), DEMAND), Placement)


@every_policy
def test_decode_workers_embed_where_there_is_no_prefill_pool(name: str) -> None:
    full = replace(D0, num_running=8, num_free_blocks=0)
    placement = _policy(name, expect_prefill=False).place(view(full, D1), DEMAND)
    assert placement == Placement(None, "d-1", Reason.COLOCATED)


@every_policy
@pytest.mark.parametrize(("stands_in", "expected"), [(True, "d-0"), (False, Lack.PREFILL_WORKER)])
def test_decode_workers_stand_in_where_they_may(name: str, stands_in: bool, expected: object) -> None:
    placement = _policy(name, local_prefill=stands_in).place(view(D0), DEMAND)
    if isinstance(placement, Placement):
        assert placement.decode_worker == expected and placement.reason is Reason.NO_PREFILL_WORKER
    else:
        assert placement.lack is expected


@every_policy
def test_it_waits_for_room_and_for_ever_where_it_fits_nowhere(name: str) -> None:
    policy = _policy(name, local_prefill=False)
    full = replace(P0, ahead_tokens=1000, unstarted_tokens=1000, num_bound=9)
    assert policy.place(view(full, D0), DEMAND) == Wait(Lack.PREFILL_ROOM)
    large = replace(DEMAND, num_prompt_tokens=64 * 16 + 1)
    assert policy.place(view(P0, D0), large) == Wait(Lack.FIT)


def test_the_one_that_holds_the_beginning_is_preferred() -> None:
    policy = _policy("kv_cost")
    placement = policy.place(view(P0, P1), replace(DEMAND, cached={P1.session: 16}))
    assert isinstance(placement, Placement) and placement.decode_worker == "p-1"


def test_candidates_are_single_workers() -> None:
    found = candidates(
        _policy("slo"), view(P0, replace(P1, num_bound=9, ahead_tokens=5000, unstarted_tokens=5000), D0), DEMAND
    )
    assert [(one.prefill_worker, one.decode_worker, one.rejected) for one in found] == [
        ("p-0", None, ""),
        ("p-1", None, "behind"),
        (None, "d-0", "not_chosen"),
    ]
