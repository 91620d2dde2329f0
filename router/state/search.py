"""A request's search for workers: since when it finds none, and what earlier ones have taught it about some of them.

    queued ─> demand ─(policy)─> placed ─> its task is sent: the search is over
                 ^                  └─ no room: refused, and the same search goes on
                 └── the next attempt: a new search, which knows what the ones before it have learned

Sessions that have refused, pairs that have failed and the session that has the prompt in its cache are facts about
workers: they hold for the attempts to come, and so they are no attempt's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .demand import Demand
from .pools import Pools
from .request import RouterRequest
from .worker import RouterWorker

QUEUE_IF_FULL_AFTER_S = 0.25  # then a worker is asked that another router keeps full
_STALE_REFUSAL_S = 0.5  # ask again after this, though no new heartbeat came


class WorkerRefusal(NamedTuple):
    """A worker had no room."""

    at_s: float
    retry_s: float


@dataclass(slots=True, eq=False)
class Search:
    """`Search` is one request's. Two fields begin anew with each search, the others are what it has learned."""

    request: RouterRequest
    waits_s: float | None = None  # since when it has found no room
    lacks_s: float | None = None  # since when every pair has failed
    misfit_s: float | None = None  # since when no worker that is there can hold it, though one could before
    is_aside: bool = False  # for that reason, until workers come, go or change: nobody waits behind it
    num_cached: int = 0  # prompt tokens that some worker held when places were last looked for
    computed_on: int | None = None  # the prefill session that has the prompt's KV in its cache
    computed_whole: bool = False  # all of the prompt, not only its beginning
    failed_pairs: dict[tuple[int, int], str] = field(default_factory=dict)  # sessions: what happened
    late_pairs: set[tuple[int, int]] = field(default_factory=set)  # sessions whose grant was not opened in time
    refusals: dict[int, WorkerRefusal] = field(default_factory=dict)
    unfit: set[int] = field(default_factory=set)  # sessions that can never hold it
    ungranted: set[int] = field(default_factory=set)  # sessions that can never hold it beside a prefill worker's prompt

    def demand(self, pools: Pools, claimed: frozenset[int], now_s: float, *, tokens_behind: int = 0) -> Demand:
        """Return what the policy must know."""
        request = self.request
        most = max((len(choice.tokens) for choice in request.choices if choice.finish is None), default=0)
        cached = self._cached(pools)
        self.num_cached = max(cached.values(), default=0)
        limit_s, waited_s = self.ttft_limit_s, now_s - request.timestamps.get("queued", now_s)
        return Demand(
            num_prompt_tokens=request.num_prompt_tokens,
            num_tokens=request.num_prompt_tokens + most,
            max_num_tokens=max_num_tokens(request, pools),
            num_choices=len(request.unfinished),
            busy=self._busy(pools, claimed, now_s),
            unfit=frozenset(self.unfit),
            ungranted=frozenset(self.ungranted),
            failed_pairs=self._failed_pairs(pools),
            computed_on=self.computed_on,
            queue_if_full=self.queue_if_full(now_s),
            cached=cached,
            objectives=request.objectives,
            priority=request.priority,
            ttft_limit_s=limit_s,
            waited_s=waited_s,
            expected_output=pools.predictor.expected_output(request.sampling.max_tokens),
            adapter=request.adapter,
            tokens_behind=tokens_behind,
            has_prefill_pool=pools.num_ready("prefill") > 0,
            is_embedding=request.pooling is not None,
            may_miss=request.is_resume or (limit_s is not None and waited_s + self.fastest_s > limit_s),
        )

    @property
    def fastest_s(self) -> float:
        """The first token's time on empty workers of which one holds what some worker has of the prompt."""
        return self.request.unloaded_s * (1.0 - self.num_cached / max(1, self.request.num_prompt_tokens))

    @property
    def ttft_limit_s(self) -> float | None:
        return self.request.objectives.ttft_limit_s(self.request.unloaded_s)

    @property
    def whole_prompt_on(self) -> int | None:
        """The prefill session that has all of the prompt in its cache."""
        return self.computed_on if self.computed_whole else None

    def queue_if_full(self, now_s: float) -> bool:
        """Return whether it has waited for room so long that workers are asked which other routers seem to fill."""
        return self.waits_s is not None and now_s - self.waits_s >= QUEUE_IF_FULL_AFTER_S

    def is_refused_by(self, worker: RouterWorker, now_s: float) -> bool:
        """Return whether the worker had no room and has said nothing since that gives hope."""
        refusal = self.refusals.get(worker.link.number)
        if refusal is None or now_s >= max(refusal.retry_s, refusal.at_s + _STALE_REFUSAL_S):
            return False
        return now_s < refusal.retry_s or worker.status_s <= refusal.at_s

    def note_refusal(self, worker: RouterWorker, retry_after_s: float, now_s: float) -> None:
        self.refusals[worker.link.number] = WorkerRefusal(now_s, now_s + retry_after_s)
        worker.has_refused = True

    def note_failed_pair(self, pair: tuple[int, int] | None, what: str) -> None:
        if pair is not None:
            self.failed_pairs[pair] = what

    def _failed_pairs(self, pools: Pools) -> frozenset[tuple[int, int]]:
        """Return them, and those that were late, which may be dead, while there is a prefill worker without fault."""
        if not self.late_pairs:
            return frozenset(self.failed_pairs)
        all_pairs = self.failed_pairs.keys() | self.late_pairs
        at_fault = {prefill for prefill, _ in all_pairs if pools.at(prefill) is not None}
        return frozenset(all_pairs if len(at_fault) < pools.num_ready("prefill") else self.failed_pairs)

    def note_hope(self) -> None:
        """Note that there are workers that can take it, now or when they have room, or that it looks for none."""
        self.lacks_s = self.misfit_s = None
        self.is_aside = False

    def forgive_pairs(self) -> None:
        """Forget the failed pairs: there is no other one, and what failed once may not fail again."""
        self.failed_pairs.clear()
        self.lacks_s = None

    def note_late(self, pair: tuple[int, int]) -> bool:
        """Note that the pair's grant was not opened in time, and return whether it is not the first one.

        Then what one of the two says may not reach the other.
        """
        is_known = pair in self.late_pairs
        self.late_pairs.add(pair)
        return is_known

    def end(self) -> None:
        """Note that a task was sent: the search is over."""
        self.waits_s = None

    def _cached(self, pools: Pools) -> dict[int, int]:
        """Return the leading tokens of the prompt that each session's worker holds."""
        request = self.request
        if not request.block_hashes or not request.reuses_prefix:
            return {}
        held = pools.held_blocks(request.block_hashes, request.num_prompt_tokens)
        return {session: blocks * pools.block_size for session, blocks in held.items()}

    def _busy(self, pools: Pools, claimed: frozenset[int], now_s: float) -> frozenset[int]:
        refusing = [
            session
            for session in self.refusals
            if (worker := pools.at(session)) is not None and self.is_refused_by(worker, now_s)
        ]
        return claimed.union(refusing, pools.claimed) if refusing or pools.claimed else claimed


def max_num_tokens(request: RouterRequest, pools: Pools) -> int:
    """Return the tokens of the prompt and of the longest possible answer."""
    if request.pooling is not None:
        return request.num_prompt_tokens
    model_len = pools.least_model_len
    total = request.num_prompt_tokens + request.sampling.max_tokens
    return total if model_len is None else min(total, max(model_len, request.num_prompt_tokens))
