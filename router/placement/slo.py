"""The policy that keeps both objectives: one joint decision over (prefill worker or none, decode worker).

    for each near decode worker   TPOT after the request has joined, room for its expected answer
      for each near prefill worker  wait there + what is not cached there + a prefix fetched from elsewhere = TTFT
      or none                       the decode worker computes the prompt between its streams' steps
    what keeps both objectives, then what costs least: seconds to the first token, seconds of compute, harm to streams

A prompt is computed on the decode worker exactly where that is expected to be better: on an idle one nobody is
disturbed and nothing has to be shipped, and under load it takes what room the streams' objective leaves. What
each way brings is estimated in slo_estimates.py; where nothing is known yet all times are zero, and what is left is
least loaded.

A request waits in the queue, rather than breaking the pace of those that stream, as long as it can still make it. For
its own pace it does not wait: others that ask for less would be placed before it for ever. Once it streams, they wait.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..state.demand import Demand, Lack, Placement, Prediction, Reason, Wait
from ..state.objectives import filled_step_s
from ..state.predictor import Predictor, distance
from ..state.views import PoolView, Rank, WorkerView
from .embedders import embedders
from .policy import (
    BOUND_SHARE_OF_OBJECTIVE,
    MAX_BIND_WAIT_S,
    fits_decode,
    fits_prefill,
    fitting_workers,
    has_pair,
    has_prefill_room,
    may_hand_over,
    roomy_workers,
    wait_for_room,
)
from .slo_estimates import WORK, SloCandidate, SloEstimates

# None of these numbers is derived. Who changes one measures it with benchmarks.goodput and benchmarks.placement_live.
_NEAR = 6  # workers of each pool looked at, beside holders; more find better pairs, and each placement takes longer
_MAX_HOLDERS = 3  # workers looked at because they hold most of the prompt; with fewer, busy ones hide a cache
_BEST_PREFILLS = 4  # prefill workers tried with every decode worker; with fewer, one that is near may be missed
_PATIENCE = 3.0  # TTFT objectives that a request waits for room in the streams' pace; after that it breaks the pace
_DEFAULT_PATIENCE_S = 10.0  # seconds that a request without an objective waits for room in the streams' pace
_NOBODY: Rank = (0.0, 0, 0, 0)


class SloPolicy:
    """Implements `RoutingPolicy`."""

    name = "slo"
    predicts = True

    def __init__(
        self,
        predictor: Predictor,
        *,
        local_prefill: bool = True,
        max_local_prefill_tokens: int = 0,
        expect_prefill: bool = True,
        ttft_objective_s: float | None = None,
        tpot_objective_s: float | None = None,
        fetches: bool = False,
    ) -> None:
        """`tpot_objective_s`: by it workers cut prompts beside streams. `fetches`: they read each other's prefixes."""
        self._estimates = SloEstimates(predictor, fetches=fetches, tpot_objective_s=tpot_objective_s)
        self._may_prefill_locally = local_prefill or not expect_prefill
        self._max_local_prefill_tokens = max_local_prefill_tokens
        self._expect_prefill = expect_prefill
        self._max_bind_wait_s = min(MAX_BIND_WAIT_S, (ttft_objective_s or math.inf) * BOUND_SHARE_OF_OBJECTIVE)

    def place(self, view: PoolView, demand: Demand) -> Placement | Wait:
        if demand.is_embedding:
            return self._place_embedding(view, demand)
        holders = _holders(demand)
        decodes = view.nearest("decode", _NEAR, holders)
        if not decodes:
            return Wait(Lack.DECODE_WORKER)
        fitting = fitting_workers(view, "decode", decodes, fits_decode, demand)
        if not fitting:
            return Wait(Lack.FIT)
        nearest = view.nearest("prefill", _NEAR, holders)
        prefills = fitting_workers(view, "prefill", nearest, fits_prefill, demand)
        if prefills and not has_pair(prefills, fitting, demand):  # of those nearby: one further away may do
            prefills = fitting_workers(view, "prefill", (), fits_prefill, demand)
            fitting = fitting_workers(view, "decode", (), fits_decode, demand)
        lack = self._lack(prefills, fitting, demand, view)
        if lack is not None:
            return lack
        roomy = roomy_workers(view, fitting, demand)
        usable = self._usable(view, demand, prefills, fitting, roomy)
        candidates = list(self._candidates(view, demand, usable, roomy))
        if not candidates:
            return wait_for_room(fitting) if not roomy or not usable else Wait(Lack.PREFILL_ROOM)
        best = min(candidates, key=lambda one: self._order(one, demand))
        if self._is_better_off_waiting(best, demand):
            return Wait(Lack.DECODE_ROOM)
        if usable and best.prefill is None and best.decode.num_running:
            is_only_way = all(one.prefill is None for one in candidates)
            has_turn = is_only_way and self._has_sooner_turn(best, view, demand, usable)
            if has_turn or self._comes_late(best, demand):
                return Wait(Lack.PREFILL_ROOM)
        return self._placement(best, prefills, demand)

    def _place_embedding(self, view: PoolView, demand: Demand) -> Placement | Wait:
        holders = _holders(demand)
        found = embedders(
            view,
            demand,
            self._max_bind_wait_s,
            self._expect_prefill,
            stands_in=self._may_prefill_locally,
            near=lambda role: view.nearest(role, _NEAR, holders),
        )
        if isinstance(found, Wait):
            return found
        sources = self._sources(view, demand)
        estimates = [self._estimates.prefill(worker, demand, sources, view.now_s) for worker in found.workers]
        best = min(estimates, key=lambda one: (one.wait_s + (1 + WORK) * one.seconds, one.worker.prefill_rank))
        return Placement(
            None,
            best.worker.worker_id,
            found.reason,
            best.fetch.source.worker_id if best.fetch is not None else None,
            prediction=self._estimates.embedding(best, demand),
        )

    def prefill_for(self, view: PoolView, demand: Demand, decode_session: int) -> WorkerView | None:
        able = [
            worker
            for worker in view.nearest("prefill", _NEAR, _holders(demand))
            if fits_prefill(worker, demand)
            and has_prefill_room(worker, demand, self._max_bind_wait_s)
            and (worker.session, decode_session) not in demand.failed_pairs
        ]
        return min(
            able, key=lambda worker: self._estimates.prefill_s(worker, demand)[0] + worker.backlog_s, default=None
        )

    def explain(self, view: PoolView, demand: Demand) -> list[SloCandidate]:
        """Every way that is looked at for this request, the best first."""
        holders = _holders(demand)
        decodes = [worker for worker in view.nearest("decode", _NEAR, holders) if fits_decode(worker, demand)]
        prefills = [worker for worker in view.nearest("prefill", _NEAR, holders) if fits_prefill(worker, demand)]
        roomy = roomy_workers(view, decodes, demand)
        usable = self._usable(view, demand, prefills, decodes, roomy)
        found = self._candidates(view, demand, usable, roomy)
        return sorted(found, key=lambda one: self._order(one, demand))

    # --- what there is to choose from -----------------------------------------------------------------------

    def _lack(
        self, prefills: list[WorkerView], decodes: list[WorkerView], demand: Demand, view: PoolView
    ) -> Wait | None:
        """Return why nothing can serve the request at all, where decode workers may not compute prompts."""
        if self._may_prefill_locally:
            return None
        if not prefills:
            return Wait(Lack.FIT if view.num_ready("prefill") else Lack.PREFILL_WORKER)
        if not has_pair(prefills, decodes, demand):
            return Wait(Lack.PAIR)
        return None

    def _usable(
        self,
        view: PoolView,
        demand: Demand,
        prefills: list[WorkerView],
        decodes: list[WorkerView],
        roomy: list[WorkerView],
    ) -> list[WorkerView]:
        """Return the prefill workers that may hand the request over.

        None for a prompt as short as configured, but where it would wait on every decode worker.
        """
        if self._is_short(demand):
            stays = self._candidates(view, demand, [], roomy)
            if any(not self._is_better_off_waiting(one, demand) for one in stays):
                return []
        if not demand.failed_pairs and not demand.ungranted:
            return prefills
        return [one for one in prefills if has_pair([one], decodes, demand)]

    def _is_short(self, demand: Demand) -> bool:
        return self._may_prefill_locally and demand.num_prompt_tokens <= self._max_local_prefill_tokens

    def _candidates(
        self, view: PoolView, demand: Demand, prefills: list[WorkerView], roomy: list[WorkerView]
    ) -> Iterator[SloCandidate]:
        able = [worker for worker in prefills if has_prefill_room(worker, demand, self._max_bind_wait_s)]
        sources = self._sources(view, demand)
        estimates = [self._estimates.prefill(worker, demand, sources, view.now_s) for worker in able]
        estimates.sort(key=lambda one: one.wait_s + (1 + WORK) * one.seconds)
        if not demand.failed_pairs and not view.avoided_pairs:
            del estimates[_BEST_PREFILLS:]
        for decode in roomy:
            tpot_s = self._estimates.tpot_s(decode, demand)
            if self._may_prefill_locally:
                local = self._estimates.local(decode, demand, tpot_s, sources, is_only_way=not prefills)
                if local is not None and (local.prefill_s or not prefills):
                    yield local
            paths = set[str]()
            for estimate in estimates:
                path = distance(estimate.worker.hello, decode.hello)
                if may_hand_over(estimate.worker, decode, demand) and (path not in paths or view.avoided_pairs):
                    paths.add(path)  # the next one that is as far away is worse
                    yield self._estimates.handoff(view, demand, estimate, decode, path, tpot_s)

    def _sources(self, view: PoolView, demand: Demand) -> list[WorkerView]:
        """Return the workers from which the prompt's beginning may be read."""
        return [found for session in _holders(demand) if (found := view.find(session)) is not None]

    # --- which one ------------------------------------------------------------------------------------------

    def _order(self, one: SloCandidate, demand: Demand) -> tuple[bool, int, float, bool, Rank, Rank]:
        is_elsewhere = one.prefill is None or one.prefill.session != demand.computed_on
        rank = one.prefill.prefill_rank if one.prefill is not None else _NOBODY
        return (one.is_avoided, self._misses(one, demand), one.cost_s, is_elsewhere, one.decode.decode_rank, rank)

    def _misses(self, one: SloCandidate, demand: Demand) -> int:
        """Return 0 where all objectives are kept, 1 where its own pace alone is not, else 2."""
        if self._comes_late(one, demand) or self._breaks_others_pace(one, demand):
            return 2
        own_s = demand.objectives.tpot_s
        return int(own_s is not None and one.tpot_s > filled_step_s(own_s))

    def _comes_late(self, one: SloCandidate, demand: Demand) -> bool:
        """Return whether its first token would come late, and need not."""
        limit_s = demand.ttft_limit_s
        return limit_s is not None and not demand.may_miss and demand.waited_s + one.ttft_s > limit_s

    def _breaks_others_pace(self, one: SloCandidate, demand: Demand) -> bool:
        """Return whether tokens would come too slowly for streams there that are as urgent as it or more."""
        limits = [limit_s for priority, limit_s in one.decode.paces if priority <= demand.priority]
        if one.decode.num_others and demand.objectives.tpot_s is not None:
            limits.append(demand.objectives.tpot_s)  # other routers' streams: theirs are like those that come here
        if not limits:
            return False
        # What not even a stream alone would keep binds nobody else.
        alone_s = self._estimates.alone_s(one.decode)
        limit_s = min((limit_s for limit_s in limits if alone_s <= filled_step_s(limit_s)), default=math.inf)
        return one.tpot_s > filled_step_s(limit_s) or (one.is_over_pace and limit_s < math.inf)

    def _is_better_off_waiting(self, one: SloCandidate, demand: Demand) -> bool:
        """Streams would lose their pace, and the request has time, or had its chance: it does not wait for ever."""
        if not self._breaks_others_pace(one, demand):
            return False
        patience_s = _DEFAULT_PATIENCE_S if demand.ttft_limit_s is None else _PATIENCE * demand.ttft_limit_s
        return demand.waited_s < patience_s

    def _has_sooner_turn(self, one: SloCandidate, view: PoolView, demand: Demand, prefills: list[WorkerView]) -> bool:
        """Return whether prefill workers would have done all that wait, and this prompt, sooner than streams let it.

        Where there is an objective, it says what is soon enough.
        """
        if demand.ttft_limit_s is not None:
            return False
        estimates = [self._estimates.prefill(worker, demand, [], view.now_s) for worker in prefills]
        prompts = 1 + demand.tokens_behind / demand.num_prompt_tokens  # as long as this one
        return one.ttft_s >= min(found.wait_s + prompts * found.seconds for found in estimates)

    def _placement(self, one: SloCandidate, prefills: list[WorkerView], demand: Demand) -> Placement:
        prediction = Prediction(one.ttft_s, one.tpot_s, one.prefill_s, one.wait_s, one.cached_tokens, one.bare_s)
        if one.prefill is not None:
            return Placement(
                one.prefill.worker_id, one.decode.worker_id, Reason.HANDOFF, one.fetch_from, prediction=prediction
            )
        reason = self._local_reason(prefills, one, demand)
        return Placement(None, one.decode.worker_id, reason, one.fetch_from, prediction=prediction)

    def _local_reason(self, prefills: list[WorkerView], one: SloCandidate, demand: Demand) -> Reason:
        if not self._expect_prefill:
            return Reason.COLOCATED
        if self._is_short(demand):
            return Reason.SHORT_PROMPT
        if not prefills:
            return Reason.NO_PREFILL_WORKER
        if not has_pair(prefills, [one.decode], demand):
            return Reason.FAILED_HANDOFF
        return Reason.SOONER


def _holders(demand: Demand) -> list[int]:
    """Sessions that hold most of the prompt's beginning, and the one that has computed it for an earlier attempt."""
    most = sorted(demand.cached, key=lambda session: -demand.cached[session])[:_MAX_HOLDERS]
    return most if demand.computed_on is None else [demand.computed_on, *most]
