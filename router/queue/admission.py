"""Requests that cannot be answered in time are refused at once, with the time after which to try again.

    submit ─> room in the queue? ─> expected first token within its limit? ─> queue ─> too late by now? ─> placed
                 │ 429, or the youngest              │ 429                                │ 503
                 v  of the least urgent goes         v                                    v

The limit of a request is its class's objective for first tokens, or its own deadline if that is sooner; without
either, only the queue's length bounds what waits. A request that nobody waits ahead of is never refused: to refuse it
would leave the workers idle. Retries are not judged again, they were admitted once.
"""

from __future__ import annotations

from ...common.errors import CapacityError
from ..state.demand import Promise
from ..state.errors import StreamError
from ..state.observer import Observer
from ..state.request import RouterRequest
from ..state.tracked_request import TrackedRequest
from .arrival_load import ArrivalLoad
from .forecast import QueueForecast
from .request_queue import RequestQueue

# Of its limit, waited before a request is sent away: where even the fastest first token came too late lately, somebody
# has to be served for it to be known that the workers have become faster. Larger keeps hopeless requests longer,
# smaller sends away some that would have been in time.
_LEAST_WAIT_SHARE = 0.5
_MAX_URGENCIES = 32  # priorities whose latest arrival is remembered: a bound on memory


class Admission:
    """Decides at submit and before placement; learns from first tokens."""

    def __init__(self, queue: RequestQueue, observer: Observer) -> None:
        self.forecast = QueueForecast()
        self.arrivals = ArrivalLoad()
        self._queue = queue
        self._observer = observer
        self._admitted_s: dict[int, float] = {}  # the latest, by priority

    def check(self, request: RouterRequest, now_s: float) -> TrackedRequest | None:
        """Raises CapacityError (429) if it has to go. Returns the queued request that goes in its stead, if any."""
        self.observe(now_s)
        self.arrivals.add(request.priority, request.unloaded_s, now_s)
        victim = None
        if self._queue.is_full and not request.is_background:
            victim = self._queue.victim_for(request)
            if victim is None:
                self._observer.on_rejected("queue_full")
                text = f"{self._queue.num_bounded} requests wait, the queue holds {self._queue.max_size}"
                raise CapacityError(text, retry_after_s=self._retry_after_s(0.0, now_s))
        self._check_time(request, now_s)
        return victim

    def _check_time(self, request: RouterRequest, now_s: float) -> None:
        limit_s = self._limit_s(request)
        tokens, prompts = self._queue.ahead_of(request, now_s)
        if limit_s is None or not prompts:
            return
        expected_s = self.forecast.first_token_s(request.num_prompt_tokens, tokens, prompts, request.unloaded_s)
        latest_s = expected_s * self.forecast.caution
        if latest_s <= limit_s:
            return
        self._observer.on_rejected("deadline" if limit_s == request.timeout_s else "objective")
        wait = "1 request waits" if prompts == 1 else f"{prompts} requests wait"
        text = f"{wait}: the first token may take {latest_s:.2f} s, the limit is {limit_s:g} s"
        raise CapacityError(text, retry_after_s=self._retry_after_s(latest_s - limit_s, now_s))

    def on_admitted(self, tracked: TrackedRequest, now_s: float) -> None:
        """Note a request that is about to be queued."""
        request = tracked.request
        tokens, prompts = self._queue.ahead_of(request, now_s)
        expected_s = self.forecast.first_token_s(request.num_prompt_tokens, tokens, prompts, request.unloaded_s)
        tracked.promise = Promise(now_s, expected_s, self._limit_s(request))
        self._admitted_s.pop(request.priority, None)
        self._admitted_s[request.priority] = now_s
        if len(self._admitted_s) > _MAX_URGENCIES:
            del self._admitted_s[next(iter(self._admitted_s))]

    def on_first_token(self, tracked: TrackedRequest, now_s: float) -> None:
        """The request's first one ever."""
        stamps = tracked.request.timestamps
        self.observe(now_s)
        request, service_s = tracked.request, now_s - stamps.get("prefill_start", now_s)
        self.forecast.on_first_token(request.num_prompt_tokens, service_s, request.unloaded_s)
        if tracked.promise is not None and not tracked.request.attempt_number and not self._was_overtaken(tracked):
            self.forecast.on_kept(tracked.promise, now_s - tracked.promise.at_s)

    def observe(self, now_s: float) -> None:
        """The queue may have changed, or time has passed."""
        self.forecast.observe(now_s, somebody_waits=self._queue.num_waiting > 0)

    def too_late(self, tracked: TrackedRequest, now_s: float) -> StreamError | None:
        """Return why a queued request need not be placed any more: not even the fastest worker would make it."""
        late_s, limit_s = self.late_s(tracked), self._limit_s(tracked.request)
        if late_s is None or limit_s is None or now_s < late_s:
            return None
        if tracked.deadline_s is not None and now_s >= tracked.deadline_s:
            return None  # it has run out, which `router/dispatch/deadlines.py` says
        waited_s = now_s - tracked.request.timestamps["queued"]
        self._observer.on_rejected("late")
        text = f"after {waited_s:.2f} s in the queue a first token within {limit_s:g} s is out of reach"
        return StreamError(text, "deadline_exceeded", 503, retry_after_s=self._retry_after_s(0.0, now_s))

    def late_s(self, tracked: TrackedRequest) -> float | None:
        """Return from when on a queued request is too late, by what is known now. None: never."""
        limit_s, request = self._limit_s(tracked.request), tracked.request
        if limit_s is None or request.attempt_number or request.is_resume:
            return None
        fastest_s = max(self.forecast.fastest_s, tracked.search.fastest_s)
        return request.timestamps["queued"] + max(limit_s - fastest_s, _LEAST_WAIT_SHARE * limit_s)

    def displaced(self, now_s: float) -> StreamError:
        """Return the error of a queued request that made room for a more urgent one."""
        self._observer.on_rejected("displaced")
        text = "the queue is full, and a more urgent request came"
        return StreamError(text, "rate_limit_exceeded", 429, retry_after_s=self._retry_after_s(0.0, now_s))

    def _retry_after_s(self, excess_s: float, now_s: float) -> float:
        self.forecast.on_refused(now_s)
        return self.forecast.retry_after_s(excess_s, now_s)

    def _limit_s(self, request: RouterRequest) -> float | None:
        objective_s = request.objectives.ttft_limit_s(request.unloaded_s)
        return min((limit for limit in (objective_s, request.timeout_s) if limit is not None), default=None)

    def _was_overtaken(self, tracked: TrackedRequest) -> bool:
        """More urgent requests came later: its expectation was not about them."""
        assert tracked.promise is not None
        priority, since_s = tracked.request.priority, tracked.promise.at_s
        return any(other < priority and at_s >= since_s for other, at_s in self._admitted_s.items())
