"""Every Prometheus metric of the router, with unit, buckets and labels; one instance has its own registry.

    kvferry_*   ours. Workers' are computed at the scrape from the heartbeats, never stored (pools.py, workers.py)
    vllm:*      the same values under the names that vLLM's boards and the usual tools read (exposition.py)

Label sets are closed (labels.py). Latencies are differences of two stamps of one request. This module knows no HTTP
and imports no other folder: requests and pools are seen through protocols.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import Metric

from ...common.request import DEFAULT_CLASS, MAX_CHOICES, SamplingParams
from ...wire.workers import TransferReport
from .exposition import exposition, with_aliases
from .labels import CLOSED, FENCED, OTHER, closed
from .pools import ModelPools, PoolPicture, pool_families
from .series import (
    BYTES_BUCKETS,
    GAP_BUCKETS,
    LONG_BUCKETS,
    RATIO_BUCKETS,
    TOKEN_BUCKETS,
    TRANSFER_BUCKETS,
    TTFT_BUCKETS,
    GapHistogram,
    counter,
    counter_of,
    histogram,
    observe_between,
)


class FinishedRequest(Protocol):
    """A request in its terminal state; `timestamps` are seconds of one clock by phase."""

    @property
    def timestamps(self) -> Mapping[str, float]: ...
    @property
    def n(self) -> int: ...
    @property
    def sampling(self) -> SamplingParams: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...
    @property
    def num_longest_tokens(self) -> int: ...
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


class RouterMetrics:
    """The observer of the dispatchers and of the API. One event loop calls it."""

    def __init__(self, model_name: str, classes: Sequence[str] = (DEFAULT_CLASS,)) -> None:
        """`classes`: the names of all request classes. `model_name`: what vLLM's names for the counts here say."""
        self._model_name = model_name
        self._classes = frozenset(classes)
        self._gaps = GapHistogram()
        self._ttft = histogram("time_to_first_token_seconds", "From the queue to the first token", TTFT_BUCKETS)
        self._tpot = histogram("time_per_output_token_seconds", "Of a request, after its first token", GAP_BUCKETS)
        self._e2e = histogram("e2e_request_latency_seconds", "From the queue to the last token", LONG_BUCKETS)
        self._queue = histogram("request_queue_time_seconds", "Waiting for a placement", LONG_BUCKETS)
        self._prefill = histogram("request_prefill_time_seconds", "From placement to first token", LONG_BUCKETS)
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last", LONG_BUCKETS)
        self._inference = histogram("request_inference_time_seconds", "From placement to last token", LONG_BUCKETS)
        self._prompt_length = histogram("request_prompt_tokens", "Of a request", TOKEN_BUCKETS)
        self._answer_length = histogram("request_generation_tokens", "Of a request, in all choices", TOKEN_BUCKETS)
        self._longest = histogram("request_max_num_generation_tokens", "Of its longest choice", TOKEN_BUCKETS)
        self._asked_length = histogram("request_params_max_tokens", "That a choice may have at most", TOKEN_BUCKETS)
        self._asked_choices = histogram("request_params_n", "Choices of a request", range(1, MAX_CHOICES + 1))
        self._transfer_s = histogram("kv_transfer_seconds", "First post to last write done", TRANSFER_BUCKETS)
        self._exposed_s = histogram(
            "kv_transfer_exposed_seconds", "Part of a transfer after the last layer was computed", TRANSFER_BUCKETS
        )
        self._transfer_bytes = histogram("kv_transfer_bytes", "KV shipped for one request", BYTES_BUCKETS)
        self._transfer_failures = counter("kv_transfer_failures", "Transfers that did not end cleanly")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of answered calls")
        self._cached_tokens = counter("cached_prompt_tokens", "Prompt tokens that came from a prefix cache")
        self._generation_tokens = counter("generation_tokens", "Tokens delivered to clients")
        self._repeated_answers = counter("repeated_answers", "Answers that clients came back for with a key")
        self._embeddings = counter("embeddings", "Prompts that were embedded")
        self._success = counter("request_success", "Choices by how they ended", finished_reason="finished_reason")
        self._responses = counter("requests", "HTTP requests by status", code="code")
        self._retries = counter("retries", "Attempts that failed", stage="stage", reason="reason")
        self._fallbacks = counter("fallback", "Requests that took another way than planned", kind="fallback")
        self._dropped = counter("dropped_messages", "Messages and tokens of ended attempts", kind="dropped")
        self._fenced = counter("fenced_messages", "Of these, from workers that had been given up")
        self._duplicates = counter("duplicate_tokens_dropped", "Of these, tokens that were there already")
        self._rejections = counter("rejections", "Requests refused, or sent away from the queue", reason="rejected")
        self._resumes = counter("resumes", "Streams that lost their worker, by what became of them", result="resumed")
        self._poisoned = counter("poisoned", "Requests refused because workers were lost with them again and again")
        self._exhausted = counter("retry_budget_exhausted", "Requests failed because too much was retried already")
        self._drains = counter("drains", "Workers that began to drain")
        self._auth_failures = counter("auth_failures", "Requests without a right key")
        self._slow_clients = counter("slow_clients", "Connections cut: slow, or all framing", kind="slow")
        self._refused_connections = counter("refused_connections", "Connections without room", reason="connection")
        self._refused_workers = counter("handshake_rejects", "Workers' connections refused", kind="refused")
        self._ignored_fields = counter("ignored_fields", "Fields of requests' bodies that had no effect")
        self._batch_lines = counter("batch_lines", "Lines of batches that were answered", result="batch_line")
        self._loop_lag = histogram("event_loop_lag_seconds", "How late the router's own timer came", GAP_BUCKETS)
        self._predicted_ttft = histogram("predicted_ttft_seconds", "As at the placement", TTFT_BUCKETS)
        self._predicted_tpot = histogram("predicted_tpot_seconds", "As at the placement", GAP_BUCKETS)
        self._ttft_error = histogram(
            "ttft_prediction_error_ratio", "From placement to first token: actual / predicted", RATIO_BUCKETS
        )
        self._tpot_error = histogram("tpot_prediction_error_ratio", "Actual / predicted", RATIO_BUCKETS)
        self._placements = counter("placements", "Requests sent to workers", policy="policy", reason="placed")
        named = tuple(sorted(self._classes))
        self._good = counter_of("goodput_requests", "Answers that met all of their objectives", {"class": named})
        self._missed = counter_of(
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
        self._observe_lengths(request)
        if request.is_background:
            return  # nobody waited
        observe_between(self._queue, stamps, "queued", "prefill_start")
        observe_between(self._prefill, stamps, "prefill_start", "first_token")
        observe_between(self._ttft, stamps, "queued", "first_token")
        observe_between(self._decode, stamps, "first_token", "last_token")
        observe_between(self._inference, stamps, "prefill_start", "last_token")
        if "first_token" in stamps:
            observe_between(self._e2e, stamps, "queued", "finished")
        tokens_after_first = request.num_longest_tokens - 1  # choices run side by side, and the longest ends last
        if tokens_after_first > 0 and "last_token" in stamps and "first_token" in stamps:
            self._tpot.observe((stamps["last_token"] - stamps["first_token"]) / tokens_after_first)

    def _observe_lengths(self, request: FinishedRequest) -> None:
        self._prompt_length.observe(request.num_prompt_tokens)
        if request.embedding:
            return
        self._answer_length.observe(request.num_output_tokens)
        self._longest.observe(request.num_longest_tokens)
        self._asked_length.observe(request.sampling.max_tokens)
        self._asked_choices.observe(request.n)

    def on_outcome(self, outcome: CountedOutcome) -> None:
        for metric, value in (
            (self._predicted_ttft, outcome.predicted_ttft_s),
            (self._predicted_tpot, outcome.predicted_tpot_s),
            (self._ttft_error, outcome.ttft_error),
            (self._tpot_error, outcome.tpot_error),
        ):
            if value is not None:
                metric.observe(value)
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

    def on_repeated(self) -> None:
        self._repeated_answers.inc()

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

    def scrape(self, models: ModelPools, *, num_in_flight: int) -> Callable[[], tuple[bytes, str]]:
        """Look at the pools, on the event loop. Returns what writes (text, media type) of /metrics.

        That takes tens of milliseconds, in which tokens would wait: it is for a thread, and reads nothing that changes
        but the counters here.
        """
        now = [*with_aliases(self._gaps.family(), self._model_name), *self._counts_now()]
        seen = [(name, PoolPicture.of(view)) for name, view in models]
        classes = sorted(self._classes)
        return lambda: exposition([*self._own(), *now, *pool_families(seen, classes, num_in_flight)])

    def _own(self) -> Iterator[Metric]:
        metrics = (value for value in vars(self).values() if isinstance(value, (Counter, Histogram)))
        for metric in metrics:
            for family in metric.collect():
                yield from with_aliases(family, self._model_name)

    def _counts_now(self) -> list[Metric]:
        """Return families of a few numbers besides, as they are at the scrape."""
        return []
