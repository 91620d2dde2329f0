"""A worker as flags describe it: any model by its config.json, in a layout, on hardware that is known or was measured.

options ─> read_worker ─> Sizer ─> fleet_of ─> Fleet       `kvferry size`, and `kvferry simulate` of a checkpoint
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from ...common.config import Dtype, EngineConfig, ExpertExchange, KVCacheDtype, QuantizationName
from ...common.errors import ConfigError
from ...models.config import ModelConfig
from ...models.files import resolve_config
from ...models.parts.chunks import check_chunks
from ...models.parts.experts import check_exchange, expert_plan
from ...models.parts.states import check_states
from ...models.parts.uneven_heads import check_uneven
from ...sizing.cpu_rates import CpuRates
from ...sizing.figures import Sizer
from ...sizing.hardware import CPU, GPUS, Gpu, gpu_named, measured_cpu, probed_cpu
from ...sizing.memory import GPU_BATCHED_TOKENS, block_tokens, check_cache_dtype, check_latent_dtype
from ...tools.load.arguments import named_path, positive_float
from ..costs.measured import read_json
from ..costs.network import LATENCY_S, Link, Network
from ..scenario import Fleet

_LINK_SHARE = 0.8  # of a port's published rate that RDMA reaches
_MOST_MEMORY_GB = 1e6  # of a GPU or a machine: there is none with so much
_CPU_BATCHED_TOKENS = 512  # as a worker's default on a CPU


def read_worker(options: argparse.Namespace) -> tuple[ModelConfig, EngineConfig, Gpu]:
    """Return the model that is named, whose config.json is enough, and how it is served on what. Raises ConfigError."""
    gpu = _gpu(options)
    model_dir = resolve_config(options.model, options.revision)
    engine = _engine(options, gpu, model_dir)
    check_cache_dtype(engine, is_cpu=gpu.is_cpu)
    model = ModelConfig.from_dir(model_dir)
    check_latent_dtype(engine, model)
    check_uneven(model.uneven, engine, is_cuda=not gpu.is_cpu)
    check_chunks(model.sliding_windows, engine, is_cuda=not gpu.is_cpu)
    if model.latent is not None and not gpu.is_cpu:
        num_heads = model.num_qo_heads // engine.tensor_parallel_size
        model.latent.check_cuda(num_heads, engine.max_num_batched_tokens)
    if model.states is not None:
        check_states(engine, is_cuda=not gpu.is_cpu)
    if engine.enable_expert_parallel and model.experts is None:
        raise ConfigError(f"enable_expert_parallel: {model.architecture} has no experts; leave it away")
    check_exchange(engine)
    expert_plan(engine, model.experts, model.sparse_layers)  # a file that is named is read, whether it matters or not
    return model, engine, gpu


def _engine(options: argparse.Namespace, gpu: Gpu, model_dir: Path) -> EngineConfig:
    fields = {
        "dtype": options.dtype,
        "quantization": options.quantization,
        "kv_cache_dtype": options.kv_cache_dtype,
        "tensor_parallel_size": options.tensor_parallel_size,
        "enable_expert_parallel": options.enable_expert_parallel,
        "expert_plan": options.expert_plan,
        "expert_exchange": options.expert_exchange,
        "block_size": options.block_size,
        "max_num_seqs": options.max_num_seqs,
        "gpu_memory_utilization": options.gpu_memory_utilization,
    }
    try:
        return EngineConfig(
            model_dir=model_dir,
            served_model_name=str(options.model),
            device="cpu" if gpu.is_cpu else "cuda",
            max_num_batched_tokens=batched_tokens(gpu, "prefill"),
            **fields,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{first['loc'][0]}: {first['msg']}") from None


def batched_tokens(gpu: Gpu, role: str) -> int:
    """Return the tokens of a worker's largest step, unless it is told another number."""
    return _CPU_BATCHED_TOKENS if gpu.is_cpu else GPU_BATCHED_TOKENS[role]


def _gpu(options: argparse.Namespace) -> Gpu:
    given = {"memory_gb": options.memory_gb, "memory_gb_per_s": options.memory_gb_per_s, "tflops": options.tflops}
    if options.gpu is None:
        raise ConfigError(f"gpu: say on what: {', '.join(GPUS)}, or {CPU}")
    if (options.memory_gb or 0.0) > _MOST_MEMORY_GB:
        raise ConfigError(f"memory_gb: {options.memory_gb:.3g} is more than {_MOST_MEMORY_GB:,.0f}")
    if options.cpu_rates is not None:
        return _probed(options)
    if options.gpu.lower() == CPU:
        if missing := [name for name, value in given.items() if value is None]:
            raise ConfigError(
                f"{missing[0]}: of a CPU what was measured on it is needed: --memory-gb, --memory-gb-per-s and --tflops"
            )
        return measured_cpu(options.memory_gb, options.memory_gb_per_s, options.tflops)
    gpu = gpu_named(options.gpu)
    return replace(
        gpu,
        memory_gb=options.memory_gb or gpu.memory_gb,
        memory_tb_per_s=options.memory_gb_per_s / 1e3 if options.memory_gb_per_s else gpu.memory_tb_per_s,
        bf16_tflops=options.tflops or gpu.bf16_tflops,
    )


def _probed(options: argparse.Namespace) -> Gpu:
    """Return a CPU by its rates, which say all but how much memory it has."""
    if options.gpu.lower() != CPU:
        raise ConfigError(f"cpu_rates: {options.gpu} is no CPU: leave them away, or say --gpu {CPU}")
    for name in ("memory_gb_per_s", "tflops"):
        if getattr(options, name) is not None:
            raise ConfigError(f"{name}: --cpu-rates say it: leave one of them away")
    if options.memory_gb is None:
        raise ConfigError("memory_gb: say how much a CPU has, which --cpu-rates do not")
    return probed_cpu(options.memory_gb, _read_rates(options.cpu_rates))


def _read_rates(path: Path) -> CpuRates:
    rates = read_json("cpu_rates", path, CpuRates)
    if not rates.check():
        raise ConfigError(f"cpu_rates: {path}: no machine's")
    return rates


def link_bytes_per_s(options: argparse.Namespace, gpu: Gpu) -> float:
    """Return the bytes per second of one rank's link to another worker; on a CPU, of a copy, which reads and writes."""
    if options.link_gb_per_s is not None:
        return float(options.link_gb_per_s) * 1e9
    if gpu.is_cpu:
        return gpu.bytes_per_s / 2
    if gpu.network_gb_per_s is None:
        raise ConfigError(f"link_gb_per_s: {gpu.name} comes without a network port of its own: say what a worker has")
    return gpu.network_gb_per_s * 1e9 * _LINK_SHARE


def fleet_of(sizer: Sizer, link: float) -> Fleet:
    """Return one worker of each role. `link`: as `link_bytes_per_s` has it."""
    engine, model = sizer.engine, sizer.model
    return Fleet(
        prefill=1,
        decode=1,
        gpu=sizer.gpu,
        model=sizer.shape,
        gpus_per_worker=engine.tensor_parallel_size,
        steps=sizer.steps,
        keeps_states=model.states is not None,
        # A prompt is found, sent and kept in steps of them; short blocks are simulated as longer ones, in less time.
        block_tokens=None if model.states is None else block_tokens(engine, model),
        max_num_seqs=engine.max_num_seqs,
        max_model_len=model.longest_model_len,
        prefill_tokens=batched_tokens(sizer.gpu, "prefill"),
        decode_tokens=batched_tokens(sizer.gpu, "decode"),
        network=Network(Link(link * engine.tensor_parallel_size, LATENCY_S)),
    )


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say how a checkpoint is served, and on what, beside --gpu and the number of GPUs."""
    group.add_argument("--revision", help="of a model of the hub")
    group.add_argument("--enable-expert-parallel", action="store_true", help="each rank has whole experts")
    group.add_argument("--expert-plan", type=named_path, metavar="FILE", help="which ones (kvferry experts plan)")
    group.add_argument("--expert-exchange", choices=get_args(ExpertExchange), default="sum", help="as of serve")
    group.add_argument("--quantization", choices=get_args(QuantizationName), help="as of serve")
    group.add_argument("--dtype", choices=get_args(Dtype), default="auto")
    group.add_argument("--kv-cache-dtype", choices=get_args(KVCacheDtype), default="auto")
    group.add_argument("--gpu-memory-utilization", type=positive_float, default=0.9, metavar="X")
    group.add_argument("--memory-gb", type=positive_float, metavar="X", help="of a GPU, 10^9 bytes; default: published")
    group.add_argument("--memory-gb-per-s", type=positive_float, metavar="X", help="that it reads; default: published")
    group.add_argument(
        "--cpu-rates", type=named_path, metavar="FILE", help="of each part of a step, instead of these two"
    )
    group.add_argument("--tflops", type=positive_float, metavar="X", help="dense, bfloat16; default: published")
    group.add_argument("--link-gb-per-s", type=positive_float, metavar="X", help="of a rank; default: 0.8 of its port")
