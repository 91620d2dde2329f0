"""`kvferry size`: memory, step times, handoff, split, GPUs and cost of a model on given hardware, and what binds each.

    kvferry size Qwen/Qwen3-8B --gpu H100 --rate 20 --ttft-objective-ms 500 --tpot-objective-ms 30
    kvferry size /models/llama-70b --gpu H200 --tensor-parallel-size 4 --quantization int8 --context 8000

The model's config.json is enough. One worker's figures come from `sizing/`, as the launcher's plan does; the fleet's
from simulations of the real router and schedulers under a trace's lengths.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean
from typing import get_args

from ...common.config import EngineConfig, ExpertExchange
from ...common.errors import ConfigError, KVFerryError
from ...models.config import ModelConfig
from ...models.default import DEFAULT_MODEL_NAME
from ...sizing.figures import Sizer
from ...sizing.hardware import CPU, GPUS, Gpu
from ...tools.load.arguments import Parser, multiple, positive_float, positive_int, share
from ...tools.load.delivery import deliver
from ..lengths import with_means
from ..oracle import bound
from ..ratio import LeastFleet, least_fleet, matched
from ..scenario import Goals, Router, Scenario, Traffic
from ..simulate import quiet_simulation
from ..sources import SOURCES
from ..traffic import rows_of
from .checkpoint import add_model_flags, fleet_of, link_bytes_per_s, read_worker
from .size_report import print_size

# Of each simulation: shorter ones end before queues and batches are full, longer ones take as much longer.
_TRAFFIC_S = 20.0
_LEAST_REQUESTS = 600
_MOST_REQUESTS = 10**6  # all are in memory; the largest fleet that is searched for serves no more in that time
_MOST_MATCHED = 10**6  # workers, without a simulation
_HOURS = 3600.0
_MILLION = 1e6


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = make_parser().parse_args(words)
    quiet_simulation()
    try:
        figures = size(options)
    except KVFerryError as error:
        print(f"kvferry size: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    text = json.dumps(figures, indent=2)
    return deliver("kvferry size", (), lambda: print(text) if options.json else print_size(figures))


def size(options: argparse.Namespace) -> dict[str, object]:
    """Return every figure, as JSON has it. Raises ConfigError."""
    model, engine, gpu = read_worker(options)
    traffic = _traffic(options, model)
    lengths = rows_of(traffic)
    prompt = options.context or round(mean(row.num_prompt_tokens for row in lengths))
    output = mean(row.num_output_tokens for row in lengths)
    sizer = Sizer(engine, model, gpu, prompt)
    goals = Goals(options.ttft_objective_ms / 1e3, options.ttft_stretch, options.tpot_objective_ms / 1e3)
    link = link_bytes_per_s(options, gpu)
    batch = sizer.batch(goals.tpot_s)
    figures: dict[str, object] = {
        "model": options.model or DEFAULT_MODEL_NAME,
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
        "exchanged_bytes": _exchanged(sizer, batch.num_rows),
    }
    scenario = Scenario(traffic, fleet_of(sizer, link), Router(policy="slo"), goals)
    return figures | _fleet_figures(options, scenario, gpu, engine, prompt, output)


def _exchanged(sizer: Sizer, num_rows: int) -> dict[str, object]:
    """Return what a rank sends in a step of one row, and of so many; by either exchange where experts are whole."""
    steps = {"alone": 1, "batch": num_rows}
    figures: dict[str, object] = {name: sizer.exchanged_bytes(count) for name, count in steps.items()}
    if sizer.engine.enable_expert_parallel:
        for exchange in get_args(ExpertExchange):
            figures[exchange] = {name: sizer.exchanged_bytes(count, exchange) for name, count in steps.items()}
    return figures


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
        if workers > _MOST_MATCHED:
            raise ConfigError(f"rate: takes {workers:.3g} workers, more than {_MOST_MATCHED:,}")
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


def _traffic(options: argparse.Namespace, model: ModelConfig) -> Traffic:
    """Return the trace's lengths, made longer or shorter to the means that were asked for."""
    seconds = 0.0 if options.no_simulation else _TRAFFIC_S  # means alone matter then, of a trace's lengths
    requests = options.requests or max(_LEAST_REQUESTS, round((options.rate or 0.0) * seconds))
    if requests > _MOST_REQUESTS:
        name = "requests" if options.requests else "rate"
        raise ConfigError(
            f"{name}: {requests:.3g} requests are more than {_MOST_REQUESTS:,}, which is the most that are simulated: "
            "let fewer come (--requests), or none (--no-simulation)"
        )
    used = rows_of(Traffic(options.trace))[:requests]  # no others are priced
    rows = with_means(used, options.context, options.output_len, model.longest_model_len)
    return Traffic(rows, arrivals="poisson", rate_per_s=options.rate, num_requests=requests)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="kvferry size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as of serve; its config.json is enough")
    group = parser.add_argument_group("worker")
    group.add_argument("--gpu", help=f"{', '.join(GPUS)}, or {CPU} with what was measured on it")
    group.add_argument("--tensor-parallel-size", type=positive_int, default=1, metavar="N", help="GPUs of a worker")
    group.add_argument("--block-size", type=positive_int, metavar="N", help="tokens; default: as in serving")
    group.add_argument("--max-num-seqs", type=positive_int, default=256, metavar="N", help="of a decode step")
    add_model_flags(group)
    group = parser.add_argument_group("load")
    group.add_argument("--trace", default="sample:azure-2023-conv", help=f"lengths: {', '.join(SOURCES)}, sample:NAME")
    group.add_argument("--context", type=positive_int, metavar="N", help="mean prompt tokens; default: the trace's")
    group.add_argument("--output-len", type=positive_int, metavar="N", help="mean answer tokens; default: the trace's")
    group.add_argument("--rate", type=positive_float, metavar="X", help="requests per second; without it: no fleet")
    group.add_argument("--ttft-objective-ms", type=positive_float, default=1000.0, metavar="X")
    group.add_argument("--ttft-stretch", type=multiple, default=3.0, metavar="X")
    group.add_argument("--tpot-objective-ms", type=positive_float, default=50.0, metavar="X")
    group.add_argument("--share", type=share, default=0.9, metavar="X", help="of requests that keep both")
    text = f"of each simulation; default: {_TRAFFIC_S:g} s of them, at least {_LEAST_REQUESTS}"
    group.add_argument("--requests", type=positive_int, metavar="N", help=text)
    group.add_argument("--no-simulation", action="store_true", help="match rates alone: quick, and too few workers")
    group = parser.add_argument_group("output")
    group.add_argument("--gpu-hour-cost", type=positive_float, metavar="X", help="default: RunPod's list, if it has it")
    group.add_argument("--json", action="store_true", help="for programs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
