"""The simple policies' common part: each pool's worker is chosen apart, by a key.

    decode worker   the least key, with room for the prompt's blocks and every choice
    prefill worker  the least key, with about one step of prompts ahead at most (late binding)
    none            no prefill pool, a prompt as short as configured, or none that could take it

`LeastLoaded` takes the fewest prompt tokens ahead, then the fewest running choices, then the most free blocks.
"""

from __future__ import annotations

import math

from ..state.demand import Demand, Lack, Placement, Reason, Wait
from ..state.views import PoolView, WorkerView
from .embedders import embedders
from .policy import (
    BOUND_SHARE_OF_OBJECTIVE,
    MAX_BIND_WAIT_S,
    fits_decode,
    fits_prefill,
    has_decode_room,
    has_pair,
    has_prefill_room,
    is_behind,
    pairs_of,
    wait_for_room,
)

Key = tuple[float | int | str, ...]
_NEAR_PAIRS = 16  # of each pool, where pairs are looked at one by one; more cost their square


class LeastLoaded:
    """The fewest prompt tokens ahead; the fewest running choices, then the most free blocks."""

    name = "least_loaded"
    predicts = False

    def __init__(
        self,
        *,
        local_prefill: bool = True,
        max_local_prefill_tokens: int = 0,
        expect_prefill: bool = True,
        ttft_objective_s: float | None = None,
    ) -> None:
        """Make a policy; of an objective little is spent on a worker, where nothing can be refused any more."""
        self._max_bind_wait_s = min(MAX_BIND_WAIT_S, (ttft_objective_s or math.inf) * BOUND_SHARE_OF_OBJECTIVE)
        self._local_prefill = local_prefill or not expect_prefill
        self._max_local_prefill_tokens = max_local_prefill_tokens
        self._expect_prefill = expect_prefill

    def prefill_key(self, worker: WorkerView, demand: Demand) -> Key:
        """The worker with the least one is taken."""
        return (worker.ahead_tokens, worker.num_bound, worker.worker_id)

    def decode_key(self, worker: WorkerView, demand: Demand) -> Key:
        return (worker.num_running, worker.ahead_tokens, -worker.num_free_blocks, worker.worker_id)

    def on_placed(self, placement: Placement) -> None:
        """Note a placement, for policies that remember."""

    def place(self, view: PoolView, demand: Demand) -> Placement | Wait:
        placement = self._choose(view, demand)
        if isinstance(placement, Placement):
            self.on_placed(placement)
        return placement

    def _choose(self, view: PoolView, demand: Demand) -> Placement | Wait:
        if demand.is_embedding:
            return self._choose_embedder(view, demand)
        ready = view.ready("decode")
        if not ready:
            return Wait(Lack.DECODE_WORKER)
        decodes = [worker for worker in ready if fits_decode(worker, demand)]
        if not decodes:
            return Wait(Lack.FIT)
        prefills = view.ready("prefill")
        reason = self._local_reason(prefills, decodes, demand)
        if isinstance(reason, Wait):
            return reason
        if reason is Reason.HANDOFF:
            return self._place_pair(view, demand, prefills, decodes)
        roomy = [worker for worker in decodes if has_decode_room(worker, demand) and not is_behind(worker, demand)]
        if not roomy:
            return wait_for_room(decodes)
        return Placement(None, min(roomy, key=lambda worker: self.decode_key(worker, demand)).worker_id, reason)

    def _choose_embedder(self, view: PoolView, demand: Demand) -> Placement | Wait:
        found = embedders(view, demand, self._max_bind_wait_s, self._expect_prefill, stands_in=self._local_prefill)
        if isinstance(found, Wait):
            return found
        best = min(found.workers, key=lambda worker: self._prefill_order(worker, demand))
        return Placement(None, best.worker_id, found.reason)

    def prefill_for(self, view: PoolView, demand: Demand, decode_session: int) -> WorkerView | None:
        able = [
            worker
            for worker in self._with_prefill_room(view.ready("prefill"), demand)
            if (worker.session, decode_session) not in demand.failed_pairs
        ]
        return min(able, key=lambda worker: self._prefill_order(worker, demand), default=None)

    def _prefill_order(self, worker: WorkerView, demand: Demand) -> Key:
        return (worker.session != demand.computed_on, *self.prefill_key(worker, demand))

    def _with_prefill_room(self, prefills: list[WorkerView], demand: Demand) -> list[WorkerView]:
        return [
            worker
            for worker in prefills
            if fits_prefill(worker, demand) and has_prefill_room(worker, demand, self._max_bind_wait_s)
        ]

    def _local_reason(self, prefills: list[WorkerView], decodes: list[WorkerView], demand: Demand) -> Reason | Wait:
        """HANDOFF, or why the prompt is computed on the decode worker instead."""
        if not self._expect_prefill:
            return Reason.COLOCATED
        if self._local_prefill and demand.num_prompt_tokens <= self._max_local_prefill_tokens:
            return Reason.SHORT_PROMPT
        able = [worker for worker in prefills if fits_prefill(worker, demand)]
        if not able:
            if self._local_prefill:
                return Reason.NO_PREFILL_WORKER
            return Wait(Lack.FIT if prefills else Lack.PREFILL_WORKER)
        if has_pair(able, decodes, demand):
            return Reason.HANDOFF
        return Reason.FAILED_HANDOFF if self._local_prefill else Wait(Lack.PAIR)

    def _place_pair(
        self, view: PoolView, demand: Demand, prefills: list[WorkerView], decodes: list[WorkerView]
    ) -> Placement | Wait:
        roomy = [worker for worker in decodes if has_decode_room(worker, demand)]
        if not roomy:
            return wait_for_room(decodes)
        able = self._with_prefill_room(prefills, demand)
        if not has_pair(able, roomy, demand):
            return Wait(Lack.PREFILL_ROOM if has_pair(prefills, roomy, demand) else Lack.DECODE_ROOM)
        able.sort(key=lambda worker: self._prefill_order(worker, demand))
        roomy.sort(key=lambda worker: self.decode_key(worker, demand))
        near = pairs_of(able[:_NEAR_PAIRS], roomy[:_NEAR_PAIRS], demand) or pairs_of(able, roomy, demand)
        # The first one, but for pairs whose last handoff failed.
        prefill, decode = min(near, key=lambda pair: (pair[0].session, pair[1].session) in view.avoided_pairs)
        return Placement(prefill.worker_id, decode.worker_id, Reason.HANDOFF)
