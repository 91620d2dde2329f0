"""The forecast says when a request that joins the queue now would get its first token: measured, never configured.

    work ahead of it / drain rate  +  time from placement to first token  =  expected

The drain rate is what first tokens say: prompts (and their tokens) per second of the time in which somebody waited
for room, for only then does the system show what it can. Both rates are kept, since either prompt tokens or slots may
be scarce, and the slower answer counts. Before anything was measured nothing is expected to wait.

    caution   the factor that covers all but one in two hundred expectations, learned from those that mattered

What the caution learns from does not depend on the caution: an expectation is compared with what came, whatever was
decided on it. So there is no loop that could swing.
"""

from __future__ import annotations

import math
from collections import deque

from ..state.demand import Promise

_WINDOW_S = 10.0  # of waiting time that the drain rate looks back; shorter follows sooner, longer scatters less
_MIN_SAMPLES = 8  # first tokens; until then the rate of before is believed
_KEPT_SAMPLES = 32  # first tokens that are kept even if they are older than the window
_SMOOTHING = 0.1  # weight of the newest service time in the mean; larger follows sooner, smaller scatters less
_FASTEST_OF = 64  # latest service times of which the shortest is the fastest; more remember idle workers for longer
_REFUSED_DECAY_S = 1.0  # after which a refused request counts 1 / e; longer sends refused clients further away
_UNMEASURED_RETRY_S = 1.0  # told to refused clients while no rate is known; shorter has them ask in vain

_MISSED_SHARE = 0.005  # of the admitted that may miss what was expected: where caution neither grows nor shrinks
_CAUTION_STEP = 0.05  # of caution for one miss; larger reacts sooner and refuses more after a chance miss
_MIN_CAUTION = 1.0  # the expectation as it is; below it more are admitted than can be served
_MAX_CAUTION = 2.0  # larger refuses more where misses have causes that no refusal mends
_FIRST_CAUTION = 1.25  # before anything was kept or missed; larger refuses more of a first burst
_TELLING_SHARE = 0.5  # of its limit: a shorter expectation says nothing about those at the limit


class DrainRate:
    """Prompts per second of waiting time, over a sliding window."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0  # 0: not known
        self.prompts_per_s = 0.0
        self.work_per_s = 0.0  # seconds of predicted work
        self._waiting_s = 0.0  # time in which somebody waited
        self._began_s = 0.0  # of the window, in waiting time
        self._samples: deque[tuple[float, int, float]] = deque()  # waiting time, prompt tokens, predicted work
        self._num_tokens = 0
        self._work_s = 0.0

    def wait(self, seconds: float) -> None:
        self._waiting_s += seconds

    def add(self, num_tokens: int, work_s: float = 0.0) -> None:
        self._samples.append((self._waiting_s, num_tokens, work_s))
        self._num_tokens += num_tokens
        self._work_s += work_s
        while len(self._samples) > _KEPT_SAMPLES and self._samples[0][0] < self._waiting_s - _WINDOW_S:
            self._began_s, tokens, work_s = self._samples.popleft()
            self._num_tokens -= tokens
            self._work_s -= work_s
        span_s = self._waiting_s - self._began_s
        if len(self._samples) >= _MIN_SAMPLES and span_s > 0:
            self.tokens_per_s = self._num_tokens / span_s
            self.prompts_per_s = len(self._samples) / span_s
            self.work_per_s = self._work_s / span_s

    def restart(self) -> None:
        """Measure anew; what was known stays until enough has been seen."""
        self._samples.clear()
        self._num_tokens, self._work_s, self._began_s = 0, 0.0, self._waiting_s


class QueueForecast:
    """`QueueForecast` learns from one router's queue. Time is the caller's."""

    def __init__(self) -> None:
        self.caution = _FIRST_CAUTION
        self._rate = DrainRate()
        self._observed_s: float | None = None
        self._somebody_waits = False
        self._service_s = 0.0
        self._service_tokens = 0.0  # of the prompts that it was measured on
        self._services: deque[float] = deque(maxlen=_FASTEST_OF)
        self._refused = 0.0  # prompts, those of long ago forgotten
        self._refused_s = 0.0

    # --- what is seen ---------------------------------------------------------------------------------------

    def observe(self, now_s: float, *, somebody_waits: bool) -> None:
        """Called whenever the queue may have changed, and at each tick."""
        if self._somebody_waits and self._observed_s is not None:
            self._rate.wait(now_s - self._observed_s)
        self._observed_s, self._somebody_waits = now_s, somebody_waits

    def on_first_token(self, num_tokens: int, service_s: float, unloaded_s: float = 0.0) -> None:
        """`service_s`: from its placement on. `unloaded_s`: predicted for empty workers."""
        if self._somebody_waits:
            self._rate.add(num_tokens, unloaded_s)
        weight = _SMOOTHING if self._services else 1.0
        self._services.append(service_s)
        self._service_s += weight * (service_s - self._service_s)
        self._service_tokens += weight * (num_tokens - self._service_tokens)

    def on_kept(self, promise: Promise, took_s: float) -> None:
        """Learn how long it took where something else was expected."""
        if promise.limit_s is None or promise.expected_s < _TELLING_SHARE * promise.limit_s:
            return
        missed = took_s > promise.expected_s * self.caution
        step = 1.0 - _MISSED_SHARE if missed else -_MISSED_SHARE
        self.caution = min(_MAX_CAUTION, max(_MIN_CAUTION, self.caution + _CAUTION_STEP * step))

    def on_refused(self, now_s: float) -> None:
        self._refused = self._refused_now(now_s) + 1.0
        self._refused_s = now_s

    def on_workers_changed(self) -> None:
        """Capacity is another than it was."""
        self._rate.restart()

    def work_rate(self, num_workers: int) -> float:
        """Seconds of predicted work that are done a second; before it was seen, a worker does one."""
        return self._rate.work_per_s or max(1.0, num_workers)

    # --- what is expected -----------------------------------------------------------------------------------

    def first_token_s(self, num_tokens: int, tokens_ahead: int, prompts_ahead: int, unloaded_s: float = 0.0) -> float:
        """`unloaded_s`: what is predicted for empty workers; 0: nothing, and what is usual counts."""
        return self._wait_s(tokens_ahead, prompts_ahead) + (unloaded_s or self.service_s(num_tokens))

    def service_s(self, num_tokens: int) -> float:
        """Return the time from placement to first token; longer for a prompt longer than those that were seen."""
        return self._service_s * max(1.0, num_tokens / max(1.0, self._service_tokens))

    @property
    def fastest_s(self) -> float:
        """Nobody's first token came sooner after its placement lately; 0: nothing is known."""
        return min(self._services, default=0.0)

    def retry_after_s(self, excess_s: float, now_s: float) -> float:
        """Return when another try may succeed: the work in excess is done, and that of all who were refused lately."""
        rate = self._rate.prompts_per_s
        return excess_s + self._refused_now(now_s) / rate if rate else _UNMEASURED_RETRY_S

    def _wait_s(self, num_tokens: int, num_prompts: int) -> float:
        if not self._rate.tokens_per_s:
            return 0.0
        return max(num_tokens / self._rate.tokens_per_s, num_prompts / self._rate.prompts_per_s)

    def _refused_now(self, now_s: float) -> float:
        return self._refused * math.exp((self._refused_s - now_s) / _REFUSED_DECAY_S)
