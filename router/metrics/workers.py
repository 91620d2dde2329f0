"""Heartbeats become metrics with the labels worker and pool.

Every number of a `WorkerStatus` is exported, by the name and as the kind that it has here: whether a number only grows
cannot be seen from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from ...wire.workers import WorkerStatus

_STATES = ("starting", "ready", "draining")
_LABELS = ["worker", "pool"]
_GAUGES = {
    "num_running": ("num_requests_running", "Choices in the running batch"),
    "num_waiting": ("num_requests_waiting", "Choices that wait on the worker"),
    "waiting_tokens": ("waiting_tokens", "Prompt tokens not computed yet"),
    "step_s": ("step_seconds", "The last engine step"),
    "busy_for_s": ("running_step_seconds", "Age of the running engine step"),
    "loading_adapters": ("loading_adapters", "Adapters that are on their way into the engine's slots"),
    "decode_context": ("decode_context_tokens", "Tokens of all sequences that decode"),
    "share": ("router_share", "Of the worker's credit and free blocks that is this router's"),
    "host_blocks": ("kv_tier_host_blocks", "Cached blocks in host memory"),
    "disk_blocks": ("kv_tier_disk_blocks", "Cached blocks on the worker's disk"),
    "quarantine_s": ("quarantine_age_seconds", "Age of the oldest block that a failed handoff may still write to"),
}
_COUNTERS = {
    "steps": ("engine_steps", "Finished engine steps"),
    "num_preemptions": ("preemptions", "Sequences that lost their row or blocks to another"),
    "num_swapped_blocks": ("swapped_blocks", "Blocks of preempted sequences that went to host memory"),
    "prefix_queries": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_hits": ("prefix_cache_hits", "Prompt tokens found there"),
    "transfer_bytes": ("transfer_bytes", "KV bytes written to decode workers"),
    "wire_bytes": ("wire_bytes", "The same by the transport's own count"),
    "transfer_failures": ("transfer_failures", "Writes that failed, by the worker's own count"),
    "stale_messages": ("stale_messages", "Messages about ended grants and attempts"),
    "num_fences": ("fences", "Transfer agents replaced so that late writes cannot land"),
    "num_failed_fences": ("failed_fences", "Tries of that which failed"),
    "promoted_blocks": ("kv_tier_promoted_blocks", "Blocks copied from host memory to the device for a hit"),
    "demoted_blocks": ("kv_tier_demoted_blocks", "Cached blocks copied from the device to host memory"),
    "tier_failures": ("kv_tier_failures", "Reads and writes of the disk cache that failed, were spoilt or late"),
    "num_fetches": ("prefix_fetches", "Prefixes that were read from other workers"),
    "failed_fetches": ("failed_prefix_fetches", "Of these, those that did not bring all: the rest was computed"),
    "fetched_bytes": ("prefix_fetched_bytes", "KV bytes read so and used"),
    "fetch_s": ("prefix_fetch_seconds", "How long these reads took, summed"),
    "nonfinite_rows": ("nonfinite_rows", "Rows of steps with NaN or infinite logits: their requests got an error"),
    "draft_tokens": ("draft_tokens", "Drafted tokens that steps have verified"),
    "accepted_tokens": ("accepted_draft_tokens", "Drafted tokens that were the ones drawn"),
    "draft_prompt_tokens": ("draft_prompt_tokens", "Prompt tokens that decode workers computed by their draft model"),
    "checksum_failures": ("kv_checksum_failures", "Arrivals whose bytes were not those that were sent"),
}
# By a label: the field holds (value, count) pairs. A value that is not known here counts as "other".
_COUNTERS_BY = {"grant_rejects": ("grant_rejects", "Grants that were refused when used", "reason")}
_VALUES = {"reason": tuple("ended mac reused draining fenced_peer checksum incompatible process".split())}


class ExpertGauges(Protocol):
    """An `ExpertGauges` tells how evenly a worker's experts are chosen."""

    @property
    def num_choices(self) -> int: ...
    @property
    def imbalance(self) -> float: ...
    @property
    def rank_imbalance(self) -> float | None: ...


class WorkerGauges(Protocol):
    """One worker as the router sees it now."""

    @property
    def worker_id(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def is_ready(self) -> bool: ...
    @property
    def status(self) -> WorkerStatus | None: ...
    @property
    def expert_load(self) -> ExpertGauges | None: ...


Alive = list[tuple[tuple[str, str], WorkerStatus]]


def worker_families(workers: Sequence[WorkerGauges]) -> Iterator[Metric]:
    alive = [((worker.worker_id, worker.role), worker.status) for worker in workers if worker.status is not None]
    yield gauge(
        "kvferry_worker_state",
        "1 for the state that the worker is in",
        [*_LABELS, "state"],
        [((w.worker_id, w.role, state), float(state == _state(w))) for w in workers for state in _STATES],
    )
    yield gauge(
        "kvferry_blocks",
        "KV blocks by what they hold",
        [*_LABELS, "state"],
        [((*labels, state), count) for labels, status in alive for state, count in _blocks(status).items()],
    )
    for field, (name, text) in _GAUGES.items():
        yield gauge(f"kvferry_{name}", text, _LABELS, [(labels, _number(status, field)) for labels, status in alive])
    for field, (name, text) in _COUNTERS.items():
        yield _counter(name, text, _LABELS, [(labels, _number(status, field)) for labels, status in alive])
    for field, (name, text, label) in _COUNTERS_BY.items():
        yield _counter(name, text, [*_LABELS, label], _by_label(alive, field, _VALUES[label]))
    yield from _experts(workers)


def _experts(workers: Sequence[WorkerGauges]) -> Iterator[Metric]:
    """Three numbers of a worker: each expert's own are thousands, and stand in /admin/experts."""
    told = [((worker.worker_id, worker.role), load) for worker in workers if (load := worker.expert_load) is not None]
    text = "Choices of experts by tokens, in all layers"
    yield _counter("expert_choices", text, _LABELS, [(labels, float(load.num_choices)) for labels, load in told])
    text = "Choices of the busiest expert over the mean of all, of late"
    yield gauge("kvferry_expert_imbalance", text, _LABELS, [(labels, load.imbalance) for labels, load in told])
    of_ranks = [(labels, found) for labels, load in told if (found := load.rank_imbalance) is not None]
    text = "Choices of the busiest rank's experts over the mean of all ranks, of late: steps take so much longer"
    yield gauge("kvferry_expert_rank_imbalance", text, _LABELS, of_ranks)


def _by_label(alive: Alive, field: str, known: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], float]]:
    for labels, status in alive:
        counts = dict.fromkeys((*known, "other"), 0)
        for value, count in getattr(status, field):
            counts[value if value in known else "other"] += count
        for value, count in counts.items():
            yield (*labels, value), float(count)


def _number(status: WorkerStatus, field: str) -> float:
    return float(getattr(status, field))


def _state(worker: WorkerGauges) -> str:
    if worker.status is None:
        return "starting"
    return "draining" if worker.status.state == "ready" and not worker.is_ready else worker.status.state


def _blocks(status: WorkerStatus) -> dict[str, float]:
    """The states add up to the pool. Granted blocks are held for KV that is to arrive."""
    known = {
        "free": status.num_free_blocks - status.num_cached_blocks,
        "cached": status.num_cached_blocks,
        "granted": status.num_granted_blocks,
        "quarantined": status.num_quarantined_blocks,
    }
    return {**known, "active": status.num_blocks - sum(known.values())}


def kv_usage(status: WorkerStatus) -> float:
    """Share of the blocks that hold KV of running requests or are promised; what is only cached can be had."""
    return 1 - status.num_free_blocks / status.num_blocks if status.num_blocks else 0.0


def gauge(name: str, text: str, labels: list[str], samples: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, text: str, labels: list[str], samples: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    family = CounterMetricFamily(f"kvferry_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(list(values), value)
    return family
