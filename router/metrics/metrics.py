"""Every Prometheus metric of the router, with unit, buckets and labels; one instance has its own registry.

    kvferry_*   ours. Workers' are computed at the scrape from the heartbeats, never stored (pools.py, workers.py)
    vllm:*      the same values under the names that vLLM's boards and the usual tools read (exposition.py)

Label sets are closed (labels.py). Latencies are differences of two stamps of one request. This module knows no HTTP
and imports no other folder: requests and pools are seen through protocols.
"""

from __future__ import annotations

import collections
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, product
from typing import Protocol

from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import HistogramMetricFamily, Metric

from ...common.request import DEFAULT_CLASS
from ...wire.workers import TransferReport
from .exposition import exposition, with_aliases
from .labels import CLOSED, FENCED, OTHER, closed
from .pools import ModelPools, pool_families

_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LONG_BUCKETS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_TRANSFER_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.4, 2, 4, 10)
_BYTES_BUCKETS = tuple(float(4**power * 2**12) for power in range(12))  # 4 KiB to 16 GiB


class FinishedRequest(Protocol):
    """A request in its terminal state; `timestamps` are seconds of one clock by phase."""

    @property
    def timestamps(self) -> Mapping[str, float]: ...
    @property
    def n(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def embedding(self) -> bytes: ...
    @property
    def is_background(self) -> bool: ...


class CountedOutcome(Protocol):
    """The outcome of a request, held against its objectives. Ratios are of what came to what was predicted."""

    @property
    def request_class(self) -> str: ...
    @property
    def is_good(self) -> bool | None: ...
    @property
    def missed_stage(self) -> str: ...
    @property
    def predicted_ttft_s(self) -> float | None: ...
    @property
    def predicted_tpot_s(self) -> float | None: ...
    @property
    def ttft_error(self) -> float | None: ...
    @property
    def tpot_error(self) -> float | None: ...


class GapHistogram:
    """Gaps between tokens: observed for every token, so without prometheus_client's lock and label look-up."""

    __slots__ = ("_counts", "_sum_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(_GAP_BUCKETS) + 1)
        self._sum_s = 0.0

    def observe(self, gap_s: float) -> None:
        self._counts[bisect_left(_GAP_BUCKETS, gap_s)] += 1
        self._sum_s += gap_s

    def family(self) -> Metric:
        bounds = [*map(_bound, _GAP_BUCKETS), "+Inf"]
        buckets = list(zip(bounds, map(float, accumulate(self._counts)), strict=True))
        name = "kvferry_inter_token_latency_seconds"
        return HistogramMetricFamily(
            name, "Gap between two tokens of one choice", buckets=buckets, sum_value=self._sum_s
        )


class RouterMetrics:
    """The observer of the dispatchers and of the API. One event loop calls it."""

    def __init__(self, model_name: str, classes: Sequence[str] = (DEFAULT_CLASS,)) -> None:
        """`classes`: the names of all request classes. `model_name`: what vLLM's names for the counts here say."""
        self._model_name = model_name
        self._classes = frozenset(classes)
        self._gaps = GapHistogram()
        self._ttft = _histogram("time_to_first_token_seconds", "From the queue to the first token", _TTFT_BUCKETS)
        self._tpot = _histogram("time_per_output_token_seconds", "Of a request, after its first token", _GAP_BUCKETS)
        self._e2e = _histogram("e2e_request_latency_seconds", "From the queue to the last token", _LONG_BUCKETS)
        self._queue = _histogram("request_queue_time_seconds", "Waiting for a placement", _LONG_BUCKETS)
        self._prefill = _histogram("request_prefill_time_seconds", "From placement to first token", _LONG_BUCKETS)
        self._decode = _histogram("request_decode_time_seconds", "From the first token to the last", _LONG_BUCKETS)
        self._transfer_s = _histogram("kv_transfer_seconds", "First post to last write done", _TRANSFER_BUCKETS)
        self._exposed_s = _histogram(
            "kv_transfer_exposed_seconds", "Part of a transfer after the last layer was computed", _TRANSFER_BUCKETS
        )
        self._transfer_bytes = _histogram("kv_transfer_bytes", "KV shipped for one request", _BYTES_BUCKETS)
        self._transfer_failures = _counter("kv_transfer_failures", "Transfers that did not end cleanly")
        self._prompt_tokens = _counter("prompt_tokens", "Prompt tokens of answered calls")
        self._cached_tokens = _counter("cached_prompt_tokens", "Prompt tokens that came from a prefix cache")
        self._generation_tokens = _counter("generation_tokens", "Tokens delivered to clients")
        self._embeddings = _counter("embeddings", "Prompts that were embedded")
        self._success = _counter("request_success", "Choices by how they ended", finished_reason="finished_reason")
        self._responses = _counter("requests", "HTTP requests by status", code="code")
        self._retries = _counter("retries", "Attempts that failed", stage="stage", reason="reason")
        self._fallbacks = _counter("fallback", "Requests that took another way than planned", kind="fallback")
        self._dropped = _counter("dropped_messages", "Messages and tokens of ended attempts", kind="dropped")
        self._fenced = _counter("fenced_messages", "Of these, from workers that had been given up")
        self._duplicates = _counter("duplicate_tokens_dropped", "Of these, tokens that were there already")
        self._rejections = _counter("rejections", "Requests refused, or sent away from the queue", reason="rejected")
        self._resumes = _counter("resumes", "Streams that lost their worker, by what became of them", result="resumed")
        self._poisoned = _counter("poisoned", "Requests refused because three workers were lost in the middle of them")
        self._exhausted = _counter("retry_budget_exhausted", "Requests failed because too much was retried already")
        self._drains = _counter("drains", "Workers that began to drain")
        self._auth_failures = _counter("auth_failures", "Requests without a right key")
        self._slow_clients = _counter("slow_clients", "Connections cut: slow, or all framing", kind="slow")
        self._refused_connections = _counter("refused_connections", "Connections without room", reason="connection")
        self._refused_workers = _counter("handshake_rejects", "Workers' connections refused", kind="refused")
        self._ignored_fields = _counter("ignored_fields", "Fields of requests' bodies that had no effect")
        self._batch_lines = _counter("batch_lines", "Lines of batches that were answered", result="batch_line")
        self._loop_lag = _histogram("event_loop_lag_seconds", "How late the router's own timer came", _GAP_BUCKETS)
        self._predicted_ttft = _histogram("predicted_ttft_seconds", "As at the placement", _TTFT_BUCKETS)
        self._predicted_tpot = _histogram("predicted_tpot_seconds", "As at the placement", _GAP_BUCKETS)
        self._ttft_error = _histogram(
            "ttft_prediction_error_ratio", "From placement to first token: actual / predicted", _RATIO_BUCKETS
        )
        self._tpot_error = _histogram("tpot_prediction_error_ratio", "Actual / predicted", _RATIO_BUCKETS)
        self._placements = _counter("placements", "Requests sent to workers", policy="policy", reason="placed")
        named = tuple(sorted(self._classes))
        self._good = _counter_of("goodput_requests", "Answers that met all of their objectives", {"class": named})
        self._missed = _counter_of(
            "slo_misses",
            "Answers that did not, by the stage that spent most of the time in excess",
            {"class": named, "stage": tuple(sorted(CLOSED["missed"]))},
        )

    # --- the dispatcher's observer -------------------------------------------------------------------------

    def on_submitted(self, request: object) -> None:
        """Counted when it is answered."""

    def on_finished(self, request: FinishedRequest) -> None:
        stamps = request.timestamps
        self._cached_tokens.inc(request.num_cached_tokens)
        self._embeddings.inc(bool(request.embedding))
        if request.is_background:
            return  # nobody waited
        _observe_between(self._queue, stamps, "queued", "prefill_start")
        _observe_between(self._prefill, stamps, "prefill_start", "first_token")
        _observe_between(self._ttft, stamps, "queued", "first_token")
        _observe_between(self._decode, stamps, "first_token", "last_token")
        if "first_token" in stamps:
            _observe_between(self._e2e, stamps, "queued", "finished")
        tokens_after_first = request.num_output_tokens / max(request.n, 1) - 1
        if tokens_after_first > 0 and "last_token" in stamps and "first_token" in stamps:
            self._tpot.observe((stamps["last_token"] - stamps["first_token"]) / tokens_after_first)

    def on_outcome(self, outcome: CountedOutcome) -> None:
        for histogram, value in (
            (self._predicted_ttft, outcome.predicted_ttft_s),
            (self._predicted_tpot, outcome.predicted_tpot_s),
            (self._ttft_error, outcome.ttft_error),
            (self._tpot_error, outcome.tpot_error),
        ):
            if value is not None:
                histogram.observe(value)
        name = outcome.request_class if outcome.request_class in self._classes else OTHER
        if outcome.is_good:
            self._good.labels(name).inc()
        elif outcome.is_good is not None:
            self._missed.labels(name, closed("missed", outcome.missed_stage)).inc()

    def on_placed(self, policy: str, reason: str) -> None:
        self._placements.labels(closed("policy", policy), closed("placed", reason)).inc()

    def on_transfer(self, report: TransferReport) -> None:
        if not report.clean:
            self._transfer_failures.inc()
            return
        self._transfer_s.observe(report.transfer_s)
        self._exposed_s.observe(report.exposed_s)
        self._transfer_bytes.observe(report.num_bytes)

    def on_fallback(self, kind: str) -> None:
        self._fallbacks.labels(closed("fallback", kind)).inc()

    def on_retry(self, stage: str, reason: str) -> None:
        self._retries.labels(closed("stage", stage), closed("reason", reason)).inc()

    def on_dropped(self, kind: str) -> None:
        self._dropped.labels(closed("dropped", kind)).inc()
        if kind in FENCED:
            self._fenced.inc()
        elif kind == "duplicate":
            self._duplicates.inc()

    def on_rejected(self, reason: str) -> None:
        self._rejections.labels(closed("rejected", reason)).inc()

    def on_resumed(self, result: str) -> None:
        self._resumes.labels(closed("resumed", result)).inc()

    def on_poisoned(self) -> None:
        self._poisoned.inc()

    def on_budget_exhausted(self) -> None:
        self._exhausted.inc()

    def on_drain(self) -> None:
        self._drains.inc()

    # --- the control server's ------------------------------------------------------------------------------

    def on_handshake_refused(self, kind: str) -> None:
        self._refused_workers.labels(closed("refused", kind)).inc()

    # --- the API's -----------------------------------------------------------------------------------------

    def on_token_gap(self, gap_s: float) -> None:
        self._gaps.observe(gap_s)

    def on_answer(self, num_prompt_tokens: int, num_completion_tokens: int, finishes: Sequence[str]) -> None:
        self._prompt_tokens.inc(num_prompt_tokens)
        self._generation_tokens.inc(num_completion_tokens)
        for finish, number in collections.Counter(finishes).items():
            self._success.labels(closed("finished_reason", finish)).inc(number)

    def on_response(self, status: int) -> None:
        self._responses.labels(closed("code", str(status))).inc()

    def on_auth_failure(self) -> None:
        self._auth_failures.inc()

    def on_batch_line(self, is_ok: bool) -> None:
        self._batch_lines.labels("ok" if is_ok else "error").inc()

    def on_ignored_fields(self, number: int) -> None:
        self._ignored_fields.inc(number)

    def on_slow_client(self, kind: str) -> None:
        self._slow_clients.labels(closed("slow", kind)).inc()

    def on_loop_lag(self, lag_s: float) -> None:
        """The router's event loop came to a timer so late."""
        self._loop_lag.observe(lag_s)

    def on_refused_connection(self, reason: str) -> None:
        self._refused_connections.labels(closed("connection", reason)).inc()

    # --- the scrape ----------------------------------------------------------------------------------------

    def render(self, models: ModelPools, *, num_in_flight: int) -> tuple[bytes, str]:
        """(text, media type) of /metrics."""
        return exposition([*self._own(), *self._pools(models, num_in_flight)])

    def _own(self) -> Iterator[Metric]:
        yield from with_aliases(self._gaps.family(), self._model_name)
        metrics = (value for value in vars(self).values() if isinstance(value, (Counter, Histogram)))
        for metric in metrics:
            for family in metric.collect():
                yield from with_aliases(family, self._model_name)

    def _pools(self, models: ModelPools, num_in_flight: int) -> Iterator[Metric]:
        return pool_families(models, sorted(self._classes), num_in_flight)


def _histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
    return Histogram(f"kvferry_{name}", text, buckets=buckets, registry=None)


def _counter(name: str, text: str, **labels: str) -> Counter:
    """`labels`: name and which closed set its values are of."""
    return _counter_of(name, text, {label: tuple(sorted(CLOSED[which])) for label, which in labels.items()})


def _counter_of(name: str, text: str, labels: Mapping[str, tuple[str, ...]]) -> Counter:
    """`labels`: name and values. Every series is there from the start, at 0."""
    counter = Counter(f"kvferry_{name}", text, tuple(labels), registry=None)
    for values in product(*labels.values()) if labels else ():
        counter.labels(*values)
    return counter


def _observe_between(histogram: Histogram, stamps: Mapping[str, float], begin: str, end: str) -> None:
    if begin in stamps and end in stamps:
        histogram.observe(max(stamps[end] - stamps[begin], 0.0))


def _bound(value: float) -> str:
    return repr(float(value))
