"""Estimates what a way to serve a request brings: time to the first token, pace, compute, harm to streams.

    handoff   wait on the prefill worker + what is not cached there, computed or fetched; what is left of the transfer
              delays the second token
    local     the decode worker computes the prompt, at once if it is idle, else in what its streams' steps have left

All times are the predictor's. Nothing is chosen here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...common.pacing import MIN_CHUNK_TOKENS, PROMPT_DUE_STRETCH, RunningAnswers, WaitingPrompts, longest_step_s
from ..state.demand import Demand, Prediction
from ..state.predictor import Predictor, Way, distance
from ..state.views import PoolView, WorkerView
from .policy import is_behind

# None of these numbers is derived. Who changes one measures it with benchmarks.goodput and benchmarks.placement_live.
_EVEN = 0.03  # share by which an idle decode worker may be worse, as nobody is disturbed; larger: fewer handoffs
_HARM = 0.2  # seconds of first token that a second of delayed streams is worth; larger: fewer prompts beside streams
WORK = 1.0  # seconds of first token that a second of compute is worth; larger: prompts rather go where they are cached
_STEPS_AHEAD = 2  # steps of prompts bound to a decode worker with streams; what is bound is not decided anew
_FETCH_GAIN = 1.5  # times that a fetch must be faster than computing; nearer to 1 a late fetch loses time
_MIN_FETCH_TOKENS = 256  # fewer are computed: their fetch costs messages and saves little


@dataclass(slots=True, frozen=True)
class SloCandidate:
    """One way to serve a request, and what is expected of it."""

    prefill: WorkerView | None
    decode: WorkerView
    ttft_s: float  # from now on
    bare_s: float  # of `ttft_s`: the prompt's own steps
    tpot_s: float
    prefill_s: float
    wait_s: float
    cached_tokens: int
    harm_s: float  # by which streams are delayed, summed
    exposed_s: float = 0.0  # of the transfer, after the first token
    is_avoided: bool = False
    is_over_pace: bool = False  # its smallest chunk is too much beside these streams, and would not be beside one
    fetch_from: str | None = None

    @property
    def cost_s(self) -> float:
        cost_s = self.ttft_s + WORK * self.prefill_s + _HARM * self.harm_s
        is_nobody_there = self.prefill is None and not self.decode.num_running and not self.wait_s
        return cost_s * (1 - _EVEN) if is_nobody_there else cost_s


@dataclass(slots=True, frozen=True)
class _PrefixFetch:
    source: WorkerView
    tokens: int  # more than the worker holds itself
    seconds: float


@dataclass(slots=True, frozen=True)
class _Share:
    """`_Share` is what a decode worker's steps have for prompts beside its streams."""

    tokens: int
    step_s: float
    is_over_pace: bool


@dataclass(slots=True)
class PrefillEstimate:
    """A prefill worker, and what the prompt takes there."""

    worker: WorkerView
    seconds: float
    fetch: _PrefixFetch | None
    wait_s: float  # for what the worker serves first


class SloEstimates:
    """Estimates every way with one predictor."""

    def __init__(self, predictor: Predictor, *, fetches: bool, tpot_objective_s: float | None = None) -> None:
        """Take what holds for all workers, as `SloPolicy` has it."""
        self._predictor = predictor
        self._fetches = fetches
        self._tpot_objective_s = tpot_objective_s

    def prefill(self, worker: WorkerView, demand: Demand, sources: list[WorkerView], now_s: float) -> PrefillEstimate:
        """Estimate what the prompt takes on this worker, before it goes to any decode worker."""
        seconds, fetch = self.prefill_s(worker, demand, sources)
        wait_s = worker.wait_s(now_s + PROMPT_DUE_STRETCH * seconds) + _load_s(worker, demand)
        return PrefillEstimate(worker, seconds, fetch, wait_s)

    def embedding(self, estimate: PrefillEstimate, demand: Demand) -> Prediction:
        """Expect of a prompt that is embedded what is expected of one that a worker computes alone."""
        cached = cached_tokens(estimate.worker, demand) + (estimate.fetch.tokens if estimate.fetch is not None else 0)
        ttft_s = self._predictor.first_token_s(Way.LOCAL, estimate.seconds, estimate.wait_s)
        return Prediction(ttft_s, 0.0, estimate.seconds, estimate.wait_s, cached, estimate.seconds)

    def handoff(
        self, view: PoolView, demand: Demand, estimate: PrefillEstimate, decode: WorkerView, path: str, tpot_s: float
    ) -> SloCandidate:
        """The prefill worker computes the prompt and ships it."""
        prefill, prefill_s, fetch = estimate.worker, estimate.seconds, estimate.fetch
        predictor = self._predictor
        num_bytes = _block_bytes(demand.num_prompt_tokens - cached_tokens(decode, demand), decode)
        # The first token does not wait for the transfer, the second does.
        num_later = max(0, demand.expected_output - 1)
        exposed_s = predictor.exposed_s(path, num_bytes, prefill_s) + max(0.0, _load_s(decode, demand) - prefill_s)
        return SloCandidate(
            prefill=prefill,
            decode=decode,
            ttft_s=predictor.first_token_s(Way.HANDOFF, prefill_s, estimate.wait_s),
            bare_s=prefill_s,
            tpot_s=tpot_s + (exposed_s / num_later if num_later else 0.0),
            prefill_s=prefill_s,
            wait_s=estimate.wait_s,
            cached_tokens=cached_tokens(prefill, demand) + (fetch.tokens if fetch is not None else 0),
            harm_s=0.0,
            exposed_s=exposed_s,
            is_avoided=(prefill.session, decode.session) in view.avoided_pairs,
            fetch_from=fetch.source.worker_id if fetch is not None else None,
        )

    def local(
        self, decode: WorkerView, demand: Demand, tpot_s: float, sources: list[WorkerView], *, is_only_way: bool
    ) -> SloCandidate | None:
        """The decode worker computes the prompt: at once if it is idle, else in what its steps have left.

        `is_only_way`: no prefill worker may, so that a prompt moves on though its streams' objective is broken.
        """
        alone_s, fetch = self.prefill_s(decode, demand, sources)
        cached = cached_tokens(decode, demand) + (fetch.tokens if fetch is not None else 0)
        uncached = max(1, demand.num_prompt_tokens - cached)
        harm_s, took_s, wait_s, is_over_pace = 0.0, alone_s, decode.backlog_s, False
        budget = decode.hello.max_num_batched_tokens
        if decode.num_running and alone_s:
            step_s = self._predictor.decode_step_s(decode.session, decode.num_running, decode.context)
            share = self._share(decode, demand, step_s, alone_s, uncached, is_only_way)
            if share is None:
                return None
            is_over_pace = share.is_over_pace
            # Half of a step's prompt tokens are the oldest prompt's, the rest those of the shortest.
            ahead = min(decode.ahead_tokens, uncached)
            share_s = max(alone_s, uncached / share.tokens * share.step_s)
            harm_s = decode.num_running * (share_s - share_s / share.step_s * step_s)
            running_s = (share.step_s if ahead else step_s) / 2  # what is left of the step that runs
            took_s = max(share_s, alone_s + step_s) + running_s
            wait_s = ahead / share.tokens * share.step_s
            budget = min(budget, _STEPS_AHEAD * share.tokens)
        wait_s += _load_s(decode, demand)
        if is_behind(decode, demand, budget):
            return None
        return SloCandidate(
            prefill=None,
            decode=decode,
            ttft_s=self._predictor.first_token_s(Way.LOCAL, took_s, wait_s),
            bare_s=took_s,
            tpot_s=tpot_s,
            prefill_s=alone_s,
            wait_s=wait_s,
            cached_tokens=cached,
            harm_s=harm_s,
            is_over_pace=is_over_pace,
            fetch_from=fetch.source.worker_id if fetch is not None else None,
        )

    def _share(
        self, decode: WorkerView, demand: Demand, step_s: float, alone_s: float, uncached: int, is_only_way: bool
    ) -> _Share | None:
        """Return what its streams' steps, of `step_s` each, have for prompts; None: less than the smallest chunk."""
        waiting = None
        if demand.local_tokens_behind is not None:
            waiting_s = decode.backlog_s + alone_s * (1 + demand.local_tokens_behind / uncached)
            waiting = WaitingPrompts(waiting_s, waiting_s / alone_s)  # others as long as this one
        objective_s = self._objective_s(demand)
        one_s = self.alone_s(decode)
        limit_s = longest_step_s(objective_s, RunningAnswers(decode.num_running, step_s, one_s), waiting)
        beside = (decode.session, decode.num_running, decode.context, demand.num_prompt_tokens // 2)
        tokens = self._predictor.chunk_tokens(*beside, limit_s)
        if tokens >= MIN_CHUNK_TOKENS:
            return _Share(tokens, limit_s, is_over_pace=False)
        if objective_s is not None and not is_only_way:
            return None
        # So many a step takes along whatever its pace. What that costs its streams is counted as harm.
        chunk_step_s = self._predictor.chunk_step_s(*beside, MIN_CHUNK_TOKENS)
        beside_one_s = chunk_step_s - step_s + one_s
        is_over_pace = objective_s is not None and beside_one_s <= objective_s < chunk_step_s
        return _Share(MIN_CHUNK_TOKENS, max(limit_s, chunk_step_s), is_over_pace)

    def prefill_s(
        self, worker: WorkerView, demand: Demand, sources: list[WorkerView] | None = None
    ) -> tuple[float, _PrefixFetch | None]:
        """Return the time to compute what the worker does not hold, or to fetch some of that and compute the rest."""
        cached = cached_tokens(worker, demand)
        seconds = self._predictor.prefill_s(worker.session, max(1, demand.num_prompt_tokens - cached), cached)
        best: _PrefixFetch | None = None
        for source in sources or () if self._fetches else ():
            fetch = self._fetch(worker, source, demand, cached)
            if fetch is None:
                continue
            held = cached + fetch.tokens
            rest_s = self._predictor.prefill_s(worker.session, max(1, demand.num_prompt_tokens - held), held)
            if fetch.seconds * _FETCH_GAIN + rest_s < seconds:
                seconds, best = fetch.seconds + rest_s, fetch
        return seconds, best

    def _fetch(self, worker: WorkerView, source: WorkerView, demand: Demand, cached: int) -> _PrefixFetch | None:
        more = cached_tokens(source, demand) - cached
        if source.session == worker.session or more < _MIN_FETCH_TOKENS or source.hello.tp_size != worker.hello.tp_size:
            return None
        seconds = self._predictor.transfer_s(distance(source.hello, worker.hello), _block_bytes(more, worker))
        return _PrefixFetch(source, more, seconds) if seconds else None

    def _objective_s(self, demand: Demand) -> float | None:
        """Return the strictest objective for a time per token that a worker's streams may have."""
        known = (self._tpot_objective_s, demand.objectives.tpot_s)
        return min((objective_s for objective_s in known if objective_s is not None), default=None)

    def alone_s(self, decode: WorkerView) -> float:
        """Return the time of a step with one stream, as long as those that run there."""
        return self._predictor.decode_step_s(decode.session, 1, decode.context // max(1, decode.num_running))

    def tpot_s(self, decode: WorkerView, demand: Demand) -> float:
        """Return the time of a step in the middle of the answer, with all that runs there now."""
        context = demand.num_choices * (demand.num_tokens + demand.expected_output // 2)
        rows = decode.num_running + demand.num_choices
        return self._predictor.decode_step_s(decode.session, rows, decode.context + context)


def cached_tokens(worker: WorkerView, demand: Demand) -> int:
    """Tokens of the prompt that the worker need not compute: never all, the last one's logits are wanted."""
    if worker.session == demand.computed_on:
        return demand.num_prompt_tokens - 1
    return min(demand.cached.get(worker.session, 0), demand.num_prompt_tokens - 1)


def _load_s(worker: WorkerView, demand: Demand) -> float:
    """Return how long the request waits for its adapter there; on a decode worker, beside its prompt elsewhere."""
    return demand.load_s(worker.status.adapters if worker.status is not None else ())


def _block_bytes(num_tokens: int, worker: WorkerView) -> int:
    spec = worker.hello.spec
    return spec.num_blocks_for(max(0, num_tokens)) * spec.block_bytes()
