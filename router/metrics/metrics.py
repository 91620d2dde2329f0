"""Every Prometheus metric of the router, with unit, buckets and labels; one instance has its own registry.

    kvferry_*   ours. Workers' are computed at the scrape from the heartbeats, never stored (workers.py)
    vllm:*      the same values under the names that vLLM's boards and the usual tools read (`_ALIASES`)

Label sets are closed: what is not in `_CLOSED` counts as "other", so no client can grow the memory. Latencies are
differences of two stamps of one request. This module knows no HTTP and imports no other folder: requests and pools
are seen through the protocols below.
"""

from __future__ import annotations

import collections
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, product
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from ...common.messages import TransferReport
from ...common.request import DEFAULT_CLASS
from .workers import WorkerGauges, gauge, kv_usage, worker_families

_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LONG_BUCKETS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_TRANSFER_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.4, 2, 4, 10)
_BYTES_BUCKETS = tuple(float(4**power * 2**12) for power in range(12))  # 4 KiB to 16 GiB
_OTHER = "other"

_CLOSED: dict[str, frozenset[str]] = {
    "finished_reason": frozenset({"stop", "length", "abort", "error"}),
    "stage": frozenset({"reserve", "prefill", "transfer", "decode"}),
    "reason": frozenset("worker_lost drained worker_failure refused handoff_failed no_answer gap forgotten".split()),
    "fallback": frozenset({"local_prefill", "recompute"}),
    "dropped": frozenset(
        "stale_attempt unknown_request unknown_choice old_session wrong_worker out_of_turn "
        "duplicate mismatch overflow prompt_logprobs".split()
    ),
    "code": frozenset("200 400 401 404 405 408 413 415 429 499 500 503 504".split()),
    "rejected": frozenset("queue_full objective deadline displaced late draining quota".split()),
    "resumed": frozenset({"ok", "failed", "aborted"}),
    "slow": frozenset({"head", "body", "idle", "read", "framing"}),
    "connection": frozenset({"total", "address", "evicted"}),
    "refused": frozenset("frame size seal hello flood mismatch".split()),
    "missed": frozenset("queue retry reserve prefill_wait prefill reply transfer decode failed".split()),
    "policy": frozenset("slo least_loaded kv_cost round_robin isolation".split()),
    "placed": frozenset("handoff short_prompt colocated no_prefill_worker failed_handoff alone sooner".split()),
}
_FENCED = frozenset({"stale_attempt", "old_session", "wrong_worker"})  # from a worker that was given up before

# Our family -> vLLM's names for it, which carry its model_name label besides.
_ALIASES: dict[str, tuple[str, ...]] = {
    "kvferry_time_to_first_token_seconds": ("vllm:time_to_first_token_seconds",),
    "kvferry_inter_token_latency_seconds": ("vllm:inter_token_latency_seconds",),
    "kvferry_time_per_output_token_seconds": (
        "vllm:time_per_output_token_seconds",
        "vllm:request_time_per_output_token_seconds",
    ),
    "kvferry_e2e_request_latency_seconds": ("vllm:e2e_request_latency_seconds",),
    "kvferry_request_queue_time_seconds": ("vllm:request_queue_time_seconds",),
    "kvferry_request_prefill_time_seconds": ("vllm:request_prefill_time_seconds",),
    "kvferry_request_decode_time_seconds": ("vllm:request_decode_time_seconds",),
    "kvferry_prompt_tokens": ("vllm:prompt_tokens",),
    "kvferry_generation_tokens": ("vllm:generation_tokens",),
    "kvferry_request_success": ("vllm:request_success",),
    "kvferry_kv_transfer_seconds": ("vllm:nixl_xfer_time_seconds",),
    "kvferry_kv_transfer_bytes": ("vllm:nixl_bytes_transferred",),
    "kvferry_kv_transfer_failures": ("vllm:nixl_num_failed_transfers",),
}


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


class PoolGauges(Protocol):
    """All workers, and the router's own queue."""

    @property
    def workers(self) -> Sequence[WorkerGauges]: ...
    @property
    def num_queued(self) -> int: ...
    @property
    def queued_by_class(self) -> Mapping[str, int]: ...


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
    """The observer of the dispatcher and of the API. One event loop calls it."""

    def __init__(self, model_name: str, classes: Sequence[str] = (DEFAULT_CLASS,)) -> None:
        """`classes`: the names of all request classes."""
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
            {"class": named, "stage": tuple(sorted(_CLOSED["missed"]))},
        )

    # --- the dispatcher's observer -------------------------------------------------------------------------

    def on_submitted(self, request: object) -> None:
        """Counted when it is answered."""

    def on_finished(self, request: FinishedRequest) -> None:
        stamps = request.timestamps
        self._cached_tokens.inc(request.num_cached_tokens)
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
        name = outcome.request_class if outcome.request_class in self._classes else _OTHER
        if outcome.is_good:
            self._good.labels(name).inc()
        elif outcome.is_good is not None:
            self._missed.labels(name, _closed("missed", outcome.missed_stage)).inc()

    def on_placed(self, policy: str, reason: str) -> None:
        self._placements.labels(_closed("policy", policy), _closed("placed", reason)).inc()

    def on_transfer(self, report: TransferReport) -> None:
        if not report.clean:
            self._transfer_failures.inc()
            return
        self._transfer_s.observe(report.transfer_s)
        self._exposed_s.observe(report.exposed_s)
        self._transfer_bytes.observe(report.num_bytes)

    def on_fallback(self, kind: str) -> None:
        self._fallbacks.labels(_closed("fallback", kind)).inc()

    def on_retry(self, stage: str, reason: str) -> None:
        self._retries.labels(_closed("stage", stage), _closed("reason", reason)).inc()

    def on_dropped(self, kind: str) -> None:
        self._dropped.labels(_closed("dropped", kind)).inc()
        if kind in _FENCED:
            self._fenced.inc()
        elif kind == "duplicate":
            self._duplicates.inc()

    def on_rejected(self, reason: str) -> None:
        self._rejections.labels(_closed("rejected", reason)).inc()

    def on_resumed(self, result: str) -> None:
        self._resumes.labels(_closed("resumed", result)).inc()

    def on_poisoned(self) -> None:
        self._poisoned.inc()

    def on_budget_exhausted(self) -> None:
        self._exhausted.inc()

    def on_drain(self) -> None:
        self._drains.inc()

    # --- the control server's ------------------------------------------------------------------------------

    def on_handshake_refused(self, kind: str) -> None:
        self._refused_workers.labels(_closed("refused", kind)).inc()

    # --- the API's -----------------------------------------------------------------------------------------

    def on_token_gap(self, gap_s: float) -> None:
        self._gaps.observe(gap_s)

    def on_answer(self, num_prompt_tokens: int, num_completion_tokens: int, finishes: Sequence[str]) -> None:
        self._prompt_tokens.inc(num_prompt_tokens)
        self._generation_tokens.inc(num_completion_tokens)
        for finish, number in collections.Counter(finishes).items():
            self._success.labels(_closed("finished_reason", finish)).inc(number)

    def on_response(self, status: int) -> None:
        self._responses.labels(_closed("code", str(status))).inc()

    def on_auth_failure(self) -> None:
        self._auth_failures.inc()

    def on_slow_client(self, kind: str) -> None:
        self._slow_clients.labels(_closed("slow", kind)).inc()

    def on_loop_lag(self, lag_s: float) -> None:
        """The router's event loop came to a timer so late."""
        self._loop_lag.observe(lag_s)

    def on_refused_connection(self, reason: str) -> None:
        self._refused_connections.labels(_closed("connection", reason)).inc()

    # --- the scrape ----------------------------------------------------------------------------------------

    def render(self, view: PoolGauges, *, num_in_flight: int) -> tuple[bytes, str]:
        """(text, media type) of /metrics."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families([*self._own(), *self._pools(view, num_in_flight)]))
        return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4

    def _own(self) -> Iterator[Metric]:
        yield from self._with_aliases(self._gaps.family())
        metrics = (value for value in vars(self).values() if isinstance(value, (Counter, Histogram)))
        for metric in metrics:
            for family in metric.collect():
                yield from self._with_aliases(family)

    def _with_aliases(self, family: Metric) -> Iterator[Metric]:
        yield _renamed(family, family.name, {})
        for name in _ALIASES.get(family.name, ()):
            yield _renamed(family, name, {"model_name": self._model_name})

    def _pools(self, view: PoolGauges, num_in_flight: int) -> Iterator[Metric]:
        yield gauge("kvferry_queued_requests", "Requests in the router's queue", [], [((), view.num_queued)])
        by_class = [((name,), view.queued_by_class.get(name, 0)) for name in sorted(self._classes)]
        yield gauge("kvferry_queued_requests_by_class", "The same, by what they are to get", ["class"], by_class)
        yield gauge("kvferry_in_flight_requests", "HTTP answers under way", [], [((), num_in_flight)])
        yield from worker_families(view.workers)
        yield from self._vllm_gauges(view)

    def _vllm_gauges(self, view: PoolGauges) -> Iterator[Metric]:
        """vLLM's engine gauges, with each worker as an engine; the router's queue is one too."""
        alive = [(worker.worker_id, worker.status) for worker in view.workers if worker.status is not None]
        running = [(name, status.num_running) for name, status in alive]
        waiting = [*((name, status.num_waiting) for name, status in alive), ("router", view.num_queued)]
        usage = [(name, kv_usage(status)) for name, status in alive]
        yield self._vllm(GaugeMetricFamily, "vllm:num_requests_running", running)
        yield self._vllm(GaugeMetricFamily, "vllm:num_requests_waiting", waiting)
        yield self._vllm(GaugeMetricFamily, "vllm:kv_cache_usage_perc", usage)
        for name, counter in (
            ("vllm:prefix_cache_queries", "prefix_queries"),
            ("vllm:prefix_cache_hits", "prefix_hits"),
            ("vllm:num_preemptions", "num_preemptions"),
        ):
            values = [(worker, getattr(status, counter)) for worker, status in alive]
            yield self._vllm(CounterMetricFamily, name, values)

    def _vllm(
        self,
        kind: type[GaugeMetricFamily | CounterMetricFamily],
        name: str,
        values: Iterable[tuple[str, float]],
    ) -> Metric:
        family = kind(name, "As vLLM's; engine is the worker", labels=["model_name", "engine"])
        for engine, value in values:
            family.add_metric([self._model_name, engine], value)
        return family


class _Families(Collector):
    """Hands finished families to a registry of one scrape."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
    return Histogram(f"kvferry_{name}", text, buckets=buckets, registry=None)


def _counter(name: str, text: str, **labels: str) -> Counter:
    """`labels`: name and which closed set its values are of."""
    return _counter_of(name, text, {label: tuple(sorted(_CLOSED[which])) for label, which in labels.items()})


def _counter_of(name: str, text: str, labels: Mapping[str, tuple[str, ...]]) -> Counter:
    """`labels`: name and values. Every series is there from the start, at 0."""
    counter = Counter(f"kvferry_{name}", text, tuple(labels), registry=None)
    for values in product(*labels.values()) if labels else ():
        counter.labels(*values)
    return counter


def _renamed(family: Metric, name: str, labels: dict[str, str]) -> Metric:
    """A copy under another name, without the `_created` samples that nobody reads."""
    copy = Metric(name, family.documentation, family.type)
    copy.samples = [
        Sample(name + sample.name.removeprefix(family.name), {**labels, **sample.labels}, sample.value)
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    return copy


def _observe_between(histogram: Histogram, stamps: Mapping[str, float], begin: str, end: str) -> None:
    if begin in stamps and end in stamps:
        histogram.observe(max(stamps[end] - stamps[begin], 0.0))


def _closed(label: str, value: str) -> str:
    return value if value in _CLOSED[label] else _OTHER


def _bound(value: float) -> str:
    return repr(float(value))
