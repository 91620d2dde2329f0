"""`kvferry size`: memory, step times, handoff, split, GPUs and cost of a model on given hardware, and what binds each.

    kvferry size Qwen/Qwen3-8B --gpu H100 --rate 20 --ttft-objective-ms 500 --tpot-objective-ms 30
    kvferry size /models/llama-70b --gpu H200 --tensor-parallel-size 4 --quantization int8 --context 8000

The model's config.json is enough. One worker's figures come from `sizing/`, as the launcher's plan does; the fleet's
from simulations of the real router and schedulers under a trace's lengths.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import get_args

import msgspec
import structlog
from pydantic import ValidationError

from ..common.config import Dtype, EngineConfig, KVCacheDtype, QuantizationName
from ..common.errors import ConfigError, KVFerryError
from ..models.config import ModelConfig
from ..models.files import resolve_config
from ..sizing.cpu_rates import CpuRates
from ..sizing.figures import Sizer
from ..sizing.hardware import CPU, GPUS, Gpu, gpu_named, measured_cpu, probed_cpu
from ..sizing.memory import GPU_BATCHED_TOKENS
from ..tools.load.arguments import positive_float, positive_int
from .costs.network import Link, Network
from .oracle import bound
from .ratio import LeastFleet, least_fleet, matched
from .scenario import Fleet, Goals, Router, Scenario, Traffic
from .size_report import print_size
from .sources import SOURCES
from .traffic import rows_of

_LINK_LATENCY_S = 0.0005  # as of the simulator's network
_LINK_SHARE = 0.8  # of a port's published rate that RDMA reaches
_CPU_BATCHED_TOKENS = 512  # as a worker's default on a CPU
# Of each simulation: shorter ones end before queues and batches are full, longer ones take as much longer.
_TRAFFIC_S = 20.0
_LEAST_REQUESTS = 600
_HOURS = 3600.0
_MILLION = 1e6


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = make_parser().parse_args(words)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        figures = size(options)
    except KVFerryError as error:
        print(f"kvferry size: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        print_size(figures)
    return 0


def size(options: argparse.Namespace) -> dict[str, object]:
    """Return every figure, as JSON has it. Raises ConfigError."""
    model, engine, gpu = _inputs(options)
    traffic = _traffic(options, model)
    lengths = rows_of(traffic)
    prompt = options.context or round(mean(row.num_prompt_tokens for row in lengths))
    output = mean(row.num_output_tokens for row in lengths)
    sizer = Sizer(engine, model, gpu, prompt)
    goals = Goals(options.ttft_objective_ms / 1e3, options.ttft_stretch, options.tpot_objective_ms / 1e3)
    link = _link(options, gpu)
    batch = sizer.batch(goals.tpot_s)
    figures: dict[str, object] = {
        "model": options.model or model.architecture,
        "hardware": asdict(gpu),
        "tensor_parallel_size": engine.tensor_parallel_size,
        "quantization": engine.quantization or model.weights_form,
        "context": prompt,
        "output": output,
        "objectives": asdict(goals),
        "memory": asdict(sizer.memory()),
        "decode_alone": asdict(sizer.decode(1)),
        "batch": asdict(batch),
        "decode_batch": asdict(sizer.decode(batch.num_rows)),
        "prompt": asdict(sizer.prompt(prompt)),
        "handoff": asdict(sizer.handoff(prompt, link)) | {"link_bytes_per_s": link},
        "exchanged_bytes": {"alone": sizer.exchanged_bytes(1), "batch": sizer.exchanged_bytes(batch.num_rows)},
    }
    scenario = Scenario(traffic, _fleet(sizer, link), Router(policy="slo"), goals)
    return figures | _fleet_figures(options, scenario, gpu, engine, prompt, output)


def _fleet_figures(
    options: argparse.Namespace, scenario: Scenario, gpu: Gpu, engine: EngineConfig, prompt: int, output: float
) -> dict[str, object]:
    rates = bound(scenario, share=options.share)
    figures: dict[str, object] = {
        "rates": {
            "prefill_worker_per_s": 1 / rates.prefill_s if rates.prefill_s else None,
            "decode_worker_per_s": 1 / rates.decode_s if rates.decode_s else None,
            "binding": "prefill" if rates.prefill_s > rates.decode_s else "decode",
        }
    }
    if options.rate is None:
        return figures
    if options.no_simulation:
        workers = max(1, -(-options.rate * (rates.prefill_s + rates.decode_s) // 1))
        split, outcome = matched(rates, int(workers)), None
    else:
        found: LeastFleet = least_fleet(scenario, share=options.share)
        split, outcome = found.split, found.outcome
        figures["tried"] = [(str(one), attainment) for one, attainment in found.tried]
    num_gpus = (split.prefill + split.decode) * engine.tensor_parallel_size
    price = options.gpu_hour_cost if options.gpu_hour_cost is not None else gpu.usd_per_hour
    figures["fleet"] = {"prefill": split.prefill, "decode": split.decode, "gpus": num_gpus}
    if outcome is not None:
        late = outcome.missed
        figures["simulated"] = {
            "requests": len(outcome.requests),
            "attainment": outcome.attainment,
            "ttft_p50_ms": outcome.ttft_ms.p50,
            "ttft_p90_ms": outcome.ttft_ms.p90,
            "tpot_p50_ms": outcome.tpot_ms.p50,
            "tpot_p90_ms": outcome.tpot_ms.p90,
            "binding": max(late, key=lambda which: late[which]).upper() if any(late.values()) else "none missed",
        }
    if price is not None:
        hourly = num_gpus * price
        figures["cost"] = {
            "gpu_hour": price,
            "per_hour": hourly,
            "per_million_output_tokens": hourly / (options.rate * output * _HOURS) * _MILLION,
            "per_million_tokens": hourly / (options.rate * (prompt + output) * _HOURS) * _MILLION,
        }
    return figures


def _inputs(options: argparse.Namespace) -> tuple[ModelConfig, EngineConfig, Gpu]:
    gpu = _gpu(options)
    model_dir = resolve_config(options.model, options.revision)
    fields = {
        "dtype": options.dtype,
        "quantization": options.quantization,
        "kv_cache_dtype": options.kv_cache_dtype,
        "tensor_parallel_size": options.tensor_parallel_size,
        "enable_expert_parallel": options.enable_expert_parallel,
        "expert_plan": options.expert_plan,
        "block_size": options.block_size,
        "max_num_seqs": options.max_num_seqs,
        "gpu_memory_utilization": options.gpu_memory_utilization,
    }
    tokens = _CPU_BATCHED_TOKENS if gpu.is_cpu else GPU_BATCHED_TOKENS["prefill"]
    try:
        engine = EngineConfig(
            model_dir=model_dir,
            served_model_name=str(options.model),
            device="cpu" if gpu.is_cpu else "cuda",
            max_num_batched_tokens=tokens,
            **fields,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{first['loc'][0]}: {first['msg']}") from None
    if gpu.is_cpu and engine.kv_cache_dtype == "fp8":
        raise ConfigError("kv_cache_dtype: fp8 needs a GPU: the CPU's attention reads no 8-bit floats; use auto")
    model = ModelConfig.from_dir(model_dir)
    if engine.enable_expert_parallel and model.experts is None:
        raise ConfigError(f"enable_expert_parallel: {model.architecture} has no experts; leave it away")
    return model, engine, gpu


def _gpu(options: argparse.Namespace) -> Gpu:
    given = {"memory_gb": options.memory_gb, "memory_gb_per_s": options.memory_gb_per_s, "tflops": options.tflops}
    if options.gpu is None:
        raise ConfigError(f"gpu: say on what: {', '.join(GPUS)}, or {CPU}")
    if options.gpu.lower() == CPU and options.cpu_rates is not None and options.memory_gb is not None:
        return probed_cpu(options.memory_gb, _read_rates(options.cpu_rates))
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


def _read_rates(path: Path) -> CpuRates:
    try:
        rates = msgspec.json.decode(path.read_bytes(), type=CpuRates)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"cpu_rates: {path}: {error}") from error
    if not rates.check():
        raise ConfigError(f"cpu_rates: {path}: no machine's")
    return rates


def _link(options: argparse.Namespace, gpu: Gpu) -> float:
    """Return the bytes per second of one rank's link to another worker; on a CPU, of a copy, which reads and writes."""
    if options.link_gb_per_s is not None:
        return float(options.link_gb_per_s) * 1e9
    if gpu.is_cpu:
        return gpu.bytes_per_s / 2
    if gpu.network_gb_per_s is None:
        raise ConfigError(f"link_gb_per_s: {gpu.name} comes without a network port of its own: say what a worker has")
    return gpu.network_gb_per_s * 1e9 * _LINK_SHARE


def _traffic(options: argparse.Namespace, model: ModelConfig) -> Traffic:
    """Return the trace's lengths, made longer or shorter to the means that were asked for."""
    rows = rows_of(Traffic(options.trace))
    prompt_scale = options.context / mean(row.num_prompt_tokens for row in rows) if options.context else 1.0
    output_scale = options.output_len / mean(row.num_output_tokens for row in rows) if options.output_len else 1.0
    longest = model.longest_model_len
    scaled = []
    for row in rows:
        output = min(max(1, round(row.num_output_tokens * output_scale)), longest // 2)
        longer = row.scaled(length=prompt_scale, rate=1.0) if prompt_scale != 1.0 else row
        prompt = min(longer.num_prompt_tokens, longest - output)
        scaled.append(replace(longer, num_prompt_tokens=prompt, num_output_tokens=output))
    requests = options.requests or max(_LEAST_REQUESTS, round((options.rate or 0.0) * _TRAFFIC_S))
    return Traffic(tuple(scaled), arrivals="poisson", rate_per_s=options.rate, num_requests=requests)


def _fleet(sizer: Sizer, link: float) -> Fleet:
    engine = sizer.engine
    decode_tokens = _CPU_BATCHED_TOKENS if sizer.gpu.is_cpu else GPU_BATCHED_TOKENS["decode"]
    return Fleet(
        prefill=1,
        decode=1,
        gpu=sizer.gpu,
        model=sizer.shape,
        gpus_per_worker=engine.tensor_parallel_size,
        steps=sizer.steps,
        max_num_seqs=engine.max_num_seqs,
        max_model_len=sizer.model.longest_model_len,
        prefill_tokens=engine.max_num_batched_tokens,
        decode_tokens=decode_tokens,
        network=Network(Link(link * engine.tensor_parallel_size, _LINK_LATENCY_S)),
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvferry size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as of serve; its config.json is enough")
    group = parser.add_argument_group("worker")
    group.add_argument("--revision", help="of a model of the hub")
    group.add_argument("--gpu", help=f"{', '.join(GPUS)}, or {CPU} with what was measured on it")
    group.add_argument("--tensor-parallel-size", type=positive_int, default=1, metavar="N", help="GPUs of a worker")
    group.add_argument("--enable-expert-parallel", action="store_true", help="each rank has whole experts")
    group.add_argument("--expert-plan", type=Path, metavar="FILE", help="which ones (kvferry experts plan)")
    group.add_argument("--quantization", choices=get_args(QuantizationName), help="as of serve")
    group.add_argument("--dtype", choices=get_args(Dtype), default="auto")
    group.add_argument("--kv-cache-dtype", choices=get_args(KVCacheDtype), default="auto")
    group.add_argument("--block-size", type=positive_int, default=16, metavar="N", help="tokens")
    group.add_argument("--max-num-seqs", type=positive_int, default=256, metavar="N", help="of a decode step")
    group.add_argument("--gpu-memory-utilization", type=positive_float, default=0.9, metavar="X")
    group.add_argument("--memory-gb", type=positive_float, metavar="X", help="of a GPU, 10^9 bytes; default: published")
    group.add_argument("--memory-gb-per-s", type=positive_float, metavar="X", help="that it reads; default: published")
    group.add_argument("--cpu-rates", type=Path, metavar="FILE", help="of each part of a step, instead of these two")
    group.add_argument("--tflops", type=positive_float, metavar="X", help="dense, bfloat16; default: published")
    group.add_argument("--link-gb-per-s", type=positive_float, metavar="X", help="of a rank; default: 0.8 of its port")
    group = parser.add_argument_group("load")
    group.add_argument("--trace", default="sample:azure-2023-conv", help=f"lengths: {', '.join(SOURCES)}, sample:NAME")
    group.add_argument("--context", type=positive_int, metavar="N", help="mean prompt tokens; default: the trace's")
    group.add_argument("--output-len", type=positive_int, metavar="N", help="mean answer tokens; default: the trace's")
    group.add_argument("--rate", type=positive_float, metavar="X", help="requests per second; without it: no fleet")
    group.add_argument("--ttft-objective-ms", type=positive_float, default=1000.0, metavar="X")
    group.add_argument("--ttft-stretch", type=positive_float, default=3.0, metavar="X")
    group.add_argument("--tpot-objective-ms", type=positive_float, default=50.0, metavar="X")
    group.add_argument("--share", type=positive_float, default=0.9, metavar="X", help="of requests that keep both")
    text = f"of each simulation; default: {_TRAFFIC_S:g} s of them, at least {_LEAST_REQUESTS}"
    group.add_argument("--requests", type=positive_int, metavar="N", help=text)
    group.add_argument("--no-simulation", action="store_true", help="match rates alone: quick, and too few workers")
    group = parser.add_argument_group("output")
    group.add_argument("--gpu-hour-cost", type=positive_float, metavar="X", help="default: RunPod's list, if it has it")
    group.add_argument("--json", action="store_true", help="for programs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
