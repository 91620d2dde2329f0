"""Families of metrics as Prometheus' text, ours also under the names that vLLM's boards read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

# What the router counts itself has this in vLLM's label of an engine, by which its boards group: as the queue has
# (pools.py), beside the workers.
ROUTER_ENGINE = "router"
# Our family -> vLLM's names for it, which carry its model_name and engine labels besides.
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
    "kvferry_request_inference_time_seconds": ("vllm:request_inference_time_seconds",),
    "kvferry_request_prompt_tokens": ("vllm:request_prompt_tokens",),
    "kvferry_request_generation_tokens": ("vllm:request_generation_tokens",),
    "kvferry_request_max_num_generation_tokens": ("vllm:request_max_num_generation_tokens",),
    "kvferry_request_params_max_tokens": ("vllm:request_params_max_tokens",),
    "kvferry_request_params_n": ("vllm:request_params_n",),
    "kvferry_prompt_tokens": ("vllm:prompt_tokens",),
    "kvferry_cached_prompt_tokens": ("vllm:prompt_tokens_cached",),
    "kvferry_generation_tokens": ("vllm:generation_tokens",),
    "kvferry_request_success": ("vllm:request_success",),
    "kvferry_kv_transfer_seconds": ("vllm:nixl_xfer_time_seconds",),
    "kvferry_kv_transfer_bytes": ("vllm:nixl_bytes_transferred",),
    "kvferry_kv_transfer_failures": ("vllm:nixl_num_failed_transfers",),
}


class _Families(Collector):
    """Hands finished families to a registry of one scrape."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def exposition(families: Iterable[Metric]) -> tuple[bytes, str]:
    """(text, media type) of /metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(list(families)))
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


def with_aliases(family: Metric, model_name: str) -> Iterator[Metric]:
    yield _renamed(family, family.name, {})
    for name in _ALIASES.get(family.name, ()):
        yield _renamed(family, name, {"model_name": model_name, "engine": ROUTER_ENGINE})


def _renamed(family: Metric, name: str, labels: dict[str, str]) -> Metric:
    """A copy under another name, without the `_created` samples that nobody reads."""
    copy = Metric(name, family.documentation, family.type)
    copy.samples = [
        Sample(name + sample.name.removeprefix(family.name), {**labels, **sample.labels}, sample.value)
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    return copy
