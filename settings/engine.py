"""Settings of what a worker computes with, and of where it keeps KV."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, PositiveInt

from ..common.config import (
    Attention,
    BlockSize,
    CpuIsa,
    Device,
    ExpertExchange,
    KVCacheDtype,
    Settings,
    SpeculativeConfig,
)
from .option import ALL, ENGINES, SERVE, Option
from .values import (
    Count,
    FilePath,
    NumBytes,
    NumBytesOr0,
    NumThreads,
    Share,
    parse_kv_dtype,
    parse_number,
    parse_object,
)


class EngineSettings(Settings):
    """A worker's engine."""

    device: Annotated[Device, Option("Engine", "auto: GPUs where there are any.", ENGINES)] = "auto"
    tensor_parallel_size: Annotated[PositiveInt, Option("Engine", "Ranks of one worker.", ENGINES, short="-tp")] = 1
    enable_expert_parallel: Annotated[
        bool,
        Option("Engine", "Give each rank of a worker whole experts instead of a part of each.", ENGINES, short="-ep"),
    ] = False
    expert_plan: Annotated[
        FilePath | None, Option("Engine", "File that says which ones (kvferry experts plan). Default: even.", ENGINES)
    ] = None
    expert_exchange: Annotated[
        ExpertExchange,
        Option(
            "Engine",
            "How tokens meet whole experts. sum: each rank has all tokens, and results are summed; all_to_all: each "
            "token is sent to the ranks of its experts.",
            ENGINES,
        ),
    ] = "sum"
    block_size: Annotated[
        Annotated[BlockSize, BeforeValidator(parse_number)] | None,
        Option(
            "Engine",
            "Tokens in a KV block; more than 128 for models that keep states. Default: 16, or as the states demand.",
            ENGINES,
        ),
    ] = None
    max_num_seqs: Annotated[Count, Option("Engine", "Sequences in one step.", ENGINES)] = 64
    max_num_batched_tokens: Annotated[
        Count | None,
        Option("Engine", "Tokens in one step. Default: 512 on CPUs; on GPUs 8K (prefill) or 2K (decode).", ENGINES),
    ] = None
    gpu_memory_utilization: Annotated[Share, Option("Engine", "Share of a GPU's memory to use.", ENGINES)] = 0.9
    kv_cache_memory_bytes: Annotated[
        NumBytes | None, Option("Engine", "KV cache of one rank (2GiB, 512MiB). Default: from free memory.", ENGINES)
    ] = None
    swap_space: Annotated[
        NumBytesOr0 | None,
        Option(
            "Engine",
            "Host memory of a decode rank for preempted KV; 0: none. Default: a tenth of the KV cache; on GPUs 4GiB.",
            (*SERVE, "decode"),
        ),
    ] = None
    host_cache_memory_bytes: Annotated[
        NumBytesOr0 | None,
        Option(
            "Engine",
            "Host memory of a rank for cached KV that its GPU evicts; 0: none. Default: 8GiB, at most a tenth of what "
            "is free; on CPUs only what --disk-cache-dir needs.",
            ENGINES,
        ),
    ] = None
    disk_cache_dir: Annotated[
        FilePath | None,
        Option("Engine", "Directory on a local disk for cached KV that host memory evicts. Default: none.", ENGINES),
    ] = None
    disk_cache_bytes: Annotated[NumBytes, Option("Engine", "Room that a rank takes there.", ENGINES)] = 10 << 30
    enable_prefix_caching: Annotated[
        bool, Option("Engine", "Do not reuse the KV of equal prompt beginnings.", ENGINES)
    ] = True
    kv_cache_dtype: Annotated[
        Annotated[KVCacheDtype, BeforeValidator(parse_kv_dtype)],
        Option("Engine", "Type of cached keys and values; half the bytes: fp8 on GPUs, int8 on CPUs.", ENGINES),
    ] = "auto"
    attention_backend: Annotated[
        Attention,
        Option("Engine", "Kernels; flashinfer_fp8: prompts' queries in 8 bits too, over fp8 keys, on Hopper.", ENGINES),
    ] = "auto"
    cpu_isa: Annotated[
        CpuIsa, Option("Engine", "Instruction set of the C++ on CPUs; auto: the processor's best.", ENGINES)
    ] = "auto"
    deterministic: Annotated[
        bool,
        Option(
            "Engine",
            "A request's tokens and log-probabilities are the same to the bit whatever runs beside it, however it is "
            "cut, cached, moved or resumed. On CPUs alone.",
            ALL,
        ),
    ] = False
    speculative_config: Annotated[
        Annotated[SpeculativeConfig, BeforeValidator(parse_object)] | None,
        Option(
            "Engine",
            "Draft tokens and check several in a step, each of them the model's own draw. JSON as vLLM takes it: "
            '{"method": "ngram", "num_speculative_tokens": 5}, "suffix" (earlier answers draft, too), or "draft_model" '
            'with "model": DIRECTORY. On CPUs it turns deterministic on: no token is another than without.',
            ENGINES,
        ),
    ] = None
    enforce_eager: Annotated[
        bool, Option("Engine", "No CUDA graphs: decode steps launch every kernel from Python.", ENGINES)
    ] = False
    num_threads: Annotated[
        NumThreads | None,
        Option(
            "Engine", "CPU threads of a rank. Default: its part of the cores, and the cores of idle workers.", ENGINES
        ),
    ] = None
