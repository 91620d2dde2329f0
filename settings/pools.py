"""Settings of the pools: how many workers, what the two do not share, and how they scale."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt

from ..common.config import Attention, ExpertExchange, QuantizationName, Settings
from ..common.router_config import AutoscaleMode
from .option import FRONTS, SERVE, Option
from .values import (
    Count,
    FilePath,
    NumBytes,
    NumThreads,
    NumWorkers,
    Share,
    Texts,
    check_windows,
    on_or_off,
    parse_number,
)


class PoolSettings(Settings):
    """One pool: how many workers, and what they do not share with the other pool."""

    workers: NumWorkers = 1
    min_workers: NumWorkers | None = None  # None: 1, or 0 for a pool that starts with none
    max_workers: NumWorkers | None = None  # None: what the pools start with, however they share it
    tensor_parallel_size: PositiveInt | None = None
    enable_expert_parallel: bool | None = None
    expert_plan: FilePath | None = None
    expert_exchange: ExpertExchange | None = None
    quantization: QuantizationName | None = None
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    gpu_memory_utilization: Share | None = None
    kv_cache_memory_bytes: NumBytes | None = None
    enable_prefix_caching: bool | None = None
    attention_backend: Attention | None = None
    num_threads: NumThreads | None = None

    def overrides(self) -> dict[str, object]:
        return self.model_dump(exclude_none=True, exclude={"workers", "min_workers", "max_workers"})


class PoolsSettings(Settings):
    """Both pools."""

    prefill: Annotated[PoolSettings, Option("Pools", "Prefill workers; 0: decode workers do both.", FRONTS)] = (
        PoolSettings()
    )
    decode: Annotated[PoolSettings, Option("Pools", "Decode workers.", SERVE)] = PoolSettings()
    max_local_prefill_tokens: Annotated[
        Annotated[int, BeforeValidator(parse_number), Field(ge=0)],
        Option("Pools", "Prompts with at most so many uncached tokens stay on the decode worker.", FRONTS),
    ] = 0
    local_prefill: Annotated[bool, Option("Pools", "Never compute a prompt on a decode worker.", FRONTS)] = True

    autoscale: Annotated[
        Annotated[AutoscaleMode, BeforeValidator(on_or_off)],
        Option("Pools", "Let pools grow, shrink and lend each other workers; advise: only say so.", FRONTS),
    ] = "off"
    spare_workers: Annotated[NumWorkers, Option("Pools", "Ready workers beyond what the load needs.", FRONTS)] = 0
    scale_schedule: Annotated[
        Annotated[Texts, AfterValidator(check_windows)],
        Option("Pools", "Other bounds at a time: 'mon-fri 08:00-18:00 prefill>=4 decode>=2'; repeatable.", FRONTS),
    ] = ()
    scale_target: Annotated[
        Annotated[float, Field(gt=0.5, lt=1)],
        Option("Pools", "Share of requests that are to meet each objective.", FRONTS),
    ] = 0.99
    scale_interval: Annotated[
        Annotated[float, Field(gt=0)], Option("Pools", "Seconds between two decisions.", FRONTS)
    ] = 5.0
    scale_down_after: Annotated[
        Annotated[float, Field(ge=0)],
        Option("Pools", "Seconds for which fewer workers must have been enough.", FRONTS),
    ] = 300.0
    role_change_after: Annotated[
        Annotated[float, Field(ge=0)], Option("Pools", "The same, before a pool lends the other a worker.", FRONTS)
    ] = 15.0
