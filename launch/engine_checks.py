"""Checks that find what no worker could load or run from the plan and the model's shape alone, before a start.

The engine refuses the same things, in the same words where it can; that costs seconds, and a process.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from ..common.config import EngineConfig
from ..common.errors import ConfigError
from ..kvcache.draft_pages import draft_pages
from ..kvcache.frames import MIN_CACHE_TOKENS, too_small_a_cache
from ..models.adapter import NO_LORA_EXPERTS, Adapter, inspect_adapter
from ..models.checkpoint import check_act_order, check_checkpoint
from ..models.config import ModelConfig
from ..models.draft import check_draft
from ..models.files import check_no_code
from ..models.native import check_exact
from ..models.parts.chunks import check_chunks
from ..models.parts.experts import expert_plan
from ..models.parts.gpu_attention import check_gpu
from ..models.parts.states import check_states
from ..models.parts.uneven_heads import check_uneven
from ..sizing.adapters import expert_adapter_bytes, expert_modules
from ..sizing.memory import (
    RANK_BYTES,
    block_tokens,
    cache_token_bytes,
    check_latent_dtype,
    draft_models,
    weight_bytes,
)
from ..sizing.rank_tensors import RankTensors
from ..sizing.weights import item_bytes, lacks_native
from .host import Host
from .plan import Deployment

_GIB = 1 << 30


def check_model(deployment: Deployment, model: ModelConfig) -> None:
    """Refuse what no worker could load. Raises ConfigError."""
    for worker in deployment.workers:
        size = worker.config.engine.tensor_parallel_size
        whole_experts = worker.config.engine.enable_expert_parallel
        if whole_experts and model.experts is None:
            raise ConfigError(f"enable_expert_parallel: {model.architecture} has no experts; leave it away")
        plan = expert_plan(worker.config.engine, model.experts, model.sparse_layers)
        counts = model.shared_counts(whole_experts=whole_experts)
        splits = model.tp_sizes(whole_experts=whole_experts)
        if size not in splits:
            kv_heads = f"{model.num_kv_heads} KV heads, " if model.latent is None else ""
            raise ConfigError(
                f"tensor_parallel_size: {size} {worker.config.role} ranks cannot share {kv_heads}"
                f"{model.num_qo_heads} query heads and {_rest(counts)} evenly; possible: "
                f"{', '.join(map(str, splits))}"
            )
        model.check_length(worker.config.engine.max_model_len)
        held = {} if plan is None else plan.fullest(model.sparse_layers)
        _check_act_order(worker.config.engine, worker.config.engine.model_dir, model, held)


def _check_act_order(
    engine: EngineConfig, model_dir: Path, model: ModelConfig, held: Mapping[int, Collection[int]]
) -> None:
    """Refuse weights in act-order where ranks share their inputs. `held`: as `RankTensors` has it.

    Raises ConfigError.
    """
    size, quantization = engine.tensor_parallel_size, model.quantization
    if size == 1 or engine.load_format == "dummy" or quantization is None or not quantization.is_ordered:
        return
    own = RankTensors(model, size, held, is_exchanged=bool(held) and engine.exchanges_experts).matrices()
    modules = (module for matrix in own if matrix.num_parts > 1 for module in matrix.modules)
    check_act_order(model_dir, quantization, modules)


def check_draft_model(deployment: Deployment, model: ModelConfig) -> None:
    """Refuse a draft model that does not go with the served one on the workers' ranks. Raises ConfigError."""
    sizes: dict[str, int] = {}  # of ranks, by how the draft model lies in their pages
    for size, engine in {worker.num_ranks: worker.config.engine for worker in deployment.workers}.items():
        if (speculative := engine.speculative_config) is None or speculative.model is None:
            return
        check_no_code(speculative.model)
        longest = engine.max_model_len or model.max_model_len
        draft = check_draft(engine.model_dir, speculative.model, longest, size)
        if engine.load_format != "dummy":
            check_checkpoint(speculative.model, draft)
            _check_act_order(engine, speculative.model, draft, {})
        sizes[draft_pages(model, draft, engine.kv_cache_dtype, size).name] = size
    if len(sizes) > 1:
        raise ConfigError(
            "speculative_config: the draft model's KV heads and the served model's are not shared alike by workers of "
            f"{' and of '.join(map(str, sizes.values()))} ranks; give both pools the same tensor_parallel_size"
        )


def _rest(counts: Mapping[str, int]) -> str:
    names = {"intermediate_size": "inner columns", "moe_intermediate_size": "of an expert", "num_experts": "experts"}
    names |= {"shares of a state": "shares of a state", "num_global_key_value_heads": "KV heads of wide layers"}
    names |= {"hidden_size_per_layer_input": "inputs of a layer"}
    return ", ".join(f"{counts[name]} {what}" for name, what in names.items() if name in counts)


def is_float32(engine: EngineConfig, model: ModelConfig) -> bool:
    """Return whether the engine computes in float32."""
    return item_bytes(engine, model) == 4


def check_engine(engine: EngineConfig, model: ModelConfig) -> None:
    """Refuse kernels, types and cache sizes that do not go together, for an engine whose device is known.

    Raises ConfigError.
    """
    is_cuda = engine.device == "cuda"
    check_latent_dtype(engine, model)
    if is_cuda:
        check_gpu(engine, model, draft_models(engine))
    check_uneven(model.uneven, engine, is_cuda=is_cuda)
    check_chunks(model.sliding_windows, engine, is_cuda=is_cuda)
    if model.states is not None:
        check_states(engine, is_cuda=is_cuda)
    if engine.is_exact_on(engine.device):
        check_exact(model, lacks_native(engine, model))
    if engine.attention_backend != "auto" and engine.attention_backend.startswith("flashinfer") != is_cuda:
        raise ConfigError(f"attention_backend: {engine.attention_backend} does not run on {engine.device}; use auto")
    if engine.attention_backend == "flashinfer_fp8" and engine.kv_cache_dtype != "fp8":
        raise ConfigError(
            "attention_backend: flashinfer_fp8 multiplies by keys in 8 bits: it needs --kv-cache-dtype fp8"
        )
    if engine.kv_cache_dtype == "bfloat16" and item_bytes(engine, model) != 2:
        raise ConfigError("kv_cache_dtype: bfloat16 does not go with a model in float32; use auto")
    block_size = block_tokens(engine, model)
    block_bytes = cache_token_bytes(engine, model) * block_size
    if not engine.enable_prefix_caching and (engine.disk_cache_dir is not None or engine.host_cache_memory_bytes):
        raise ConfigError("host_cache_memory_bytes, disk_cache_dir: there is no prefix cache to keep there; enable it")
    staging = engine.host_cache_memory_bytes
    if engine.disk_cache_dir is not None and staging is not None and staging < 2 * block_bytes:
        raise ConfigError(
            f"disk_cache_dir: blocks are read into host memory first, and host_cache_memory_bytes = {staging:,} holds "
            f"less than two of {block_bytes:,} bytes; leave it out or give it more"
        )
    if engine.kv_cache_memory_bytes is not None:
        longest = min(engine.max_model_len or model.max_model_len, MIN_CACHE_TOKENS)
        if why := too_small_a_cache(engine.kv_cache_memory_bytes, block_bytes, -(-longest // block_size)):
            raise ConfigError(why)


def check_memory(deployment: Deployment, host: Host, model: ModelConfig) -> str:
    """Say what the workers of this host will take of its main memory. Raises ConfigError where it is not there."""
    adapters = _expert_adapters(deployment, model)
    taken = sum(worker.num_ranks * _rank_memory(worker.config.engine, model, adapters) for worker in deployment.workers)
    found = f"{taken / _GIB:.1f} of {host.free_memory_bytes / _GIB:.1f} GiB free"
    if taken > host.free_memory_bytes:
        raise ConfigError(
            f"memory: {deployment.num_ranks} ranks take about {found}; start fewer workers, or give each less "
            "(--kv-cache-memory-bytes)"
        )
    return found


def check_disk(deployment: Deployment) -> str:
    """Say what the caches of this host's workers take of its disks. Raises ConfigError where that is not free.

    Files of caches count as free, as workers may go on with them; those of other models a worker finds when it starts.
    """
    needed: dict[Path, int] = {}
    for worker in deployment.workers:
        engine = worker.config.engine
        if (folder := engine.disk_cache_dir) is not None:
            needed[folder] = needed.get(folder, 0) + worker.num_ranks * engine.disk_cache_bytes
    for folder, num_bytes in needed.items():
        if num_bytes > (free := _free_bytes(folder)):
            raise ConfigError(
                f"disk_cache_bytes: {num_bytes:,} bytes are needed in {folder}, {free:,} are free; lower it"
            )
    return ", ".join(f"{num_bytes / _GIB:.1f} GiB in {folder}" for folder, num_bytes in needed.items()) or "no cache"


def _free_bytes(folder: Path) -> float:
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        return shutil.disk_usage(there).free + sum(path.stat().st_blocks * 512 for path in folder.glob("*.kv"))
    except OSError:  # it may not be looked into, which is told of the folder itself
        return math.inf


def read_adapters(deployment: Deployment, model: ModelConfig) -> list[tuple[str, Adapter]]:
    """Read those that are served from the start, with their names. Raises ConfigError for what a router refuses."""
    router, found = deployment.router, []
    for name, _, path in (text.partition("=") for text in router.lora_modules):
        try:
            if name in (router.served_model_name, *router.model_aliases):
                raise ConfigError(f"{name!r} is the name of the model")
            adapter = inspect_adapter(Path(path))
            adapter.check(model, router.max_lora_rank)
        except (ConfigError, OSError) as error:
            raise ConfigError(f"lora_modules: {name}: {error}") from error
        found.append((name, adapter))
    return found


def _expert_adapters(deployment: Deployment, model: ModelConfig) -> list[Adapter]:
    """Return those that are served from the start and have something for experts. Raises ConfigError."""
    if model.experts is None:
        return []
    found = []
    for name, adapter in read_adapters(deployment, model):
        if not (modules := expert_modules(adapter)):
            continue
        engines = [worker.config.engine for worker in deployment.workers]
        if any(engine.device == "cuda" and not engine.lora_experts for engine in engines):
            raise ConfigError(f"lora_modules: {name} adapts {modules[0].name}; {NO_LORA_EXPERTS}")
        found.append(adapter)
    return found


def _rank_memory(engine: EngineConfig, model: ModelConfig, adapters: list[Adapter]) -> int:
    """Main memory of one rank: the program, what the host keeps for it and, on a CPU, weights, cache and adapters."""
    kept = RANK_BYTES + (engine.swap_space or 0) + (engine.host_cache_memory_bytes or 0)
    if engine.device == "cuda":
        return kept
    kept += expert_adapter_bytes(engine, model, adapters)
    return kept + weight_bytes(engine, model) + (engine.kv_cache_memory_bytes or 0)
