"""Policies decide who serves a request, in one file each. The interface is `policy.RoutingPolicy`."""

from __future__ import annotations

from ...common.router_config import RouterConfig, strictest_tpot_ms
from ..state.predictor import Predictor
from .kv_cost import KVCost
from .least_loaded import LeastLoaded
from .policy import RoutingPolicy
from .round_robin import RoundRobin
from .slo import SloPolicy

_SIMPLE = {policy.name: policy for policy in (LeastLoaded, RoundRobin, KVCost)}


def make_policy(config: RouterConfig, predictor: Predictor) -> RoutingPolicy:
    """The policy that `config.policy` names."""
    options = {
        "local_prefill": config.local_prefill,
        "max_local_prefill_tokens": config.max_local_prefill_tokens,
        "expect_prefill": config.expect_prefill,
        "ttft_objective_s": config.ttft_objective_ms / 1e3 if config.ttft_objective_ms is not None else None,
    }
    if config.policy == SloPolicy.name:
        tpot_ms = strictest_tpot_ms(config.tpot_objective_ms, config.classes)
        tpot_s = tpot_ms / 1e3 if tpot_ms is not None else None
        return SloPolicy(predictor, fetches=True, tpot_objective_s=tpot_s, **options)  # type: ignore[arg-type]
    return _SIMPLE[config.policy](**options)  # type: ignore[arg-type]
