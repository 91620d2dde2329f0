"""A policy that reads prefixes from other workers more often than is worth it: prompts here are too short to fetch for
speed, and how a fetch goes wrong does not depend on why it was made.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from kvferry.router.placement.policy import RoutingPolicy
from kvferry.router.state.demand import Demand, Placement, Wait
from kvferry.router.state.views import PoolView, WorkerView


class FetchingPolicy:
    """Implements `RoutingPolicy`: another's placements, some of them with a fetch."""

    def __init__(self, policy: RoutingPolicy, share: float, random: Random) -> None:
        """`share`: of the placements, those that are made without a look at caches, and fetch what there is."""
        self.name, self.predicts = policy.name, policy.predicts
        self._policy = policy
        self._share = share
        self._random = random

    def place(self, view: PoolView, demand: Demand) -> Placement | Wait:
        if self._random.random() >= self._share:
            return self._policy.place(view, demand)
        found = self._policy.place(view, replace(demand, cached={}))  # or it would go where there is nothing to fetch
        if not isinstance(found, Placement):
            return found
        reader = found.prefill_worker if found.prefill_worker is not None else found.decode_worker
        held = {worker.worker_id: demand.cached.get(worker.session, 0) for worker in view.workers}
        sources = [name for name, tokens in held.items() if tokens > held[reader]]
        return replace(found, fetch_from=self._random.choice(sources)) if sources else found

    def prefill_for(self, view: PoolView, demand: Demand, decode_session: int) -> WorkerView | None:
        return self._policy.prefill_for(view, demand, decode_session)
