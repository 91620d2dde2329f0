"""Gauges of the queues and of all workers, computed at the scrape; for vLLM's boards each worker is an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from ...wire.workers import WorkerStatus
from .exposition import ROUTER_ENGINE
from .workers import WorkerGauges, gauge, kv_usage, worker_families

_VllmValues = Sequence[tuple[list[str], float]]  # (model_name, engine) and the value


class PoolGauges(Protocol):
    """All workers of a model, and its queue in the router."""

    @property
    def workers(self) -> Sequence[WorkerGauges]: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_queued(self) -> int: ...
    @property
    def queued_by_class(self) -> Mapping[str, int]: ...


@dataclass(slots=True, frozen=True)
class PoolPicture:
    """A pool at one moment, for another thread: the router's own lists go on changing."""

    workers: tuple[WorkerGauges, ...]  # each is a picture itself
    block_size: int
    num_queued: int
    queued_by_class: Mapping[str, int]

    @classmethod
    def of(cls, view: PoolGauges) -> PoolPicture:
        return cls(tuple(view.workers), view.block_size, view.num_queued, dict(view.queued_by_class))


ModelPools = Sequence[tuple[str, PoolGauges]]  # by name of the model


def pool_families(models: ModelPools, classes: Sequence[str], num_in_flight: int) -> Iterator[Metric]:
    views = [view for _, view in models]
    num_queued = sum(view.num_queued for view in views)
    yield gauge("kvferry_queued_requests", "Requests in the router's queue", [], [((), num_queued)])
    by_class = [((name,), sum(view.queued_by_class.get(name, 0) for view in views)) for name in classes]
    yield gauge("kvferry_queued_requests_by_class", "The same, by what they are to get", ["class"], by_class)
    yield gauge("kvferry_in_flight_requests", "HTTP answers under way", [], [((), num_in_flight)])
    yield from worker_families([worker for view in views for worker in view.workers])
    yield from _vllm_gauges(models)


def _vllm_gauges(models: ModelPools) -> Iterator[Metric]:
    """The router's queue is an engine too."""
    alive: list[tuple[list[str], WorkerStatus]] = []
    waiting: list[tuple[list[str], float]] = []
    for model, view in models:
        found = [([model, each.worker_id], each.status) for each in view.workers if each.status is not None]
        alive += found
        waiting += [
            *((names, status.num_waiting) for names, status in found),
            ([model, ROUTER_ENGINE], view.num_queued),
        ]
    running = [(names, status.num_running) for names, status in alive]
    usage = [(names, kv_usage(status)) for names, status in alive]
    yield _vllm(GaugeMetricFamily, "vllm:num_requests_running", running)
    yield _vllm(GaugeMetricFamily, "vllm:num_requests_waiting", waiting)
    yield _vllm(GaugeMetricFamily, "vllm:kv_cache_usage_perc", usage)
    yield _cache_config(models)
    for name, counter in (
        ("vllm:prefix_cache_queries", "prefix_queries"),
        ("vllm:prefix_cache_hits", "prefix_hits"),
        ("vllm:num_preemptions", "num_preemptions"),
        ("vllm:spec_decode_num_draft_tokens", "draft_tokens"),
        ("vllm:spec_decode_num_accepted_tokens", "accepted_tokens"),
    ):
        yield _vllm(CounterMetricFamily, name, [(names, getattr(status, counter)) for names, status in alive])


def _cache_config(models: ModelPools) -> Metric:
    """Tell the caches' sizes in labels, as vLLM does: pickers of a gateway read how much each engine holds."""
    labels = ["model_name", "engine", "block_size", "num_gpu_blocks"]
    samples = [
        ((model, each.worker_id, str(view.block_size), str(each.status.num_blocks)), 1.0)
        for model, view in models
        for each in view.workers
        if each.status is not None
    ]
    return gauge("vllm:cache_config_info", "As vLLM's; engine is the worker, whose device it is", labels, samples)


def _vllm(kind: type[GaugeMetricFamily | CounterMetricFamily], name: str, values: _VllmValues) -> Metric:
    family = kind(name, "As vLLM's; engine is the worker", labels=["model_name", "engine"])
    for names, value in values:
        family.add_metric(names, value)
    return family
