"""`kvferry simulate`: a fleet under a trace, in virtual time. One run for each policy that is named.

    kvferry simulate --trace azure-2023-conv --rate 20 --prefill 2 --decode 6 --policy slo,least_loaded

The router and the workers' schedulers are those that `kvferry serve` runs; the engines are models of their step times,
from published figures of a GPU and a model, or fitted to a live worker's steps (--steps).
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import get_args

import structlog

from ...common.errors import ConfigError, KVFerryError
from ...common.router_config import AutoscaleConfig, PolicyName, PoolBounds
from ...sizing.figures import Sizer
from ...sizing.hardware import CPU, GPUS
from ...sizing.shapes import MODELS, is_published
from ...tools.load.arguments import Parser, multiple, natural, output_file, positive_float, positive_int, share
from ...tools.load.environment import describe_environment
from ...tools.load.plot import check_plot_path
from ...tools.load.report import report_console
from ..costs.measured import fit, read_samples
from ..oracle import bound
from ..scenario import Adapters, Day, Drafts, Failure, Fleet, Goals, Router, Scaled, Scenario, Spike, Traffic
from ..simulate import at_rate, capacity, simulate
from ..sources import SOURCES
from ..traffic import rows_of
from .checkpoint import add_model_flags, fleet_of, link_bytes_per_s, read_worker
from .simulate_report import Run, plot_runs, print_runs, save_runs

# Of what a run sets aside memory for, by flag: more is no fleet, and no machine simulates it.
_MOST = {"prefill": 10**5, "decode": 10**5, "tensor_parallel_size": 1024, "adapters": 10**6, "requests": 10**7}
_MOST_LENGTH_SCALE = 1e6
_NUMBER = r"(\d+(?:\.\d*)?)"
_SPIKE = re.compile(f"{_NUMBER}:{_NUMBER}:{_NUMBER}", re.ASCII)
_FAILURE = re.compile(rf"((?:prefill|decode)-\d+)@{_NUMBER}(?:\+{_NUMBER})?", re.ASCII)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = make_parser().parse_args(words)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        if options.plot is not None:
            check_plot_path(options.plot)
        runs = [_run(name, options) for name in _policies(options.policy)]
    except KVFerryError as error:
        print(f"kvferry simulate: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    console = report_console(file_width=180)
    print_runs(runs, console)
    if options.oracle:
        best = bound(runs[0][1], share=options.share)
        console.print(
            f"Bound of an oracle: {best.goodput_per_s:.2f} good requests/s, {best.prefill_share:.0%} of the workers "
            f"for prompts; an infinite cache would hold {best.hit_rate:.1%} of their tokens"
        )
    if options.json is not None:
        save_runs(runs, describe_environment("kvferry simulate", words), options.json)
    if options.plot is not None:
        plot_runs(runs, options.plot)
    return 0


def _policies(text: str) -> list[str]:
    names, known = [name.strip() for name in text.split(",")], (*get_args(PolicyName), "colocated")
    for name in names:
        if name not in known:
            raise ConfigError(f"policy: {name!r} is none of {', '.join(known)}")
    return names


def _run(policy: str, options: argparse.Namespace) -> Run:
    """`colocated` stands for the same workers without a prefill pool."""
    scenario = scenario_of(options)
    if policy == "colocated":
        scenario = _colocated(scenario)
        scenario = replace(scenario, router=replace(scenario.router, policy="least_loaded"))
    else:
        scenario = replace(scenario, router=replace(scenario.router, policy=policy))
    _check_failures(policy, scenario)
    if not options.capacity:
        return policy, scenario, simulate(scenario)
    found = capacity(scenario, share=options.share, start_per_s=options.rate)
    if found.outcome is None:
        raise KVFerryError(f"{policy}: at no rate down to {found.tried[-1][0]:.3g}/s is {options.share:.0%} good")
    return f"{policy} at {found.rate_per_s:.2f}/s", at_rate(scenario, found.rate_per_s), found.outcome


def _colocated(scenario: Scenario) -> Scenario:
    """Return it with as many workers and no prefill pool, which then no autoscaler makes, as in a deployment."""
    fleet, scaled = scenario.fleet, scenario.scaled
    if scaled is not None:
        none = scaled.config.model_copy(update={"prefill": PoolBounds(at_least=0, at_most=0)})
        scaled = replace(scaled, config=none)
    return replace(scenario, fleet=replace(fleet, prefill=0, decode=fleet.prefill + fleet.decode), scaled=scaled)


def _check_failures(policy: str, scenario: Scenario) -> None:
    """Refuse to kill a worker that is never there. An autoscaler may start any."""
    counts = {"prefill": scenario.fleet.prefill, "decode": scenario.fleet.decode}
    for failure in scenario.failures:
        role, _, number = failure.worker.partition("-")
        if scenario.scaled is None and (int(number) >= counts[role] or number != str(int(number))):
            known = ", ".join(f"{role}-0 to {role}-{count - 1}" for role, count in counts.items() if count)
            raise ConfigError(f"fail: {policy} has no worker {failure.worker}: it has {known}")


def scenario_of(options: argparse.Namespace) -> Scenario:
    for name, most in (*_MOST.items(), ("length_scale", _MOST_LENGTH_SCALE)):
        if (value := getattr(options, name)) is not None and value > most:
            raise ConfigError(f"{name}: {value:,} is more than {most:,}")
    goals = Goals(options.ttft_objective_ms / 1e3, options.ttft_stretch, options.tpot_objective_ms / 1e3)
    traffic = Traffic(
        trace=options.trace,
        part=options.part,
        arrivals="poisson" if options.poisson else "recorded",
        rate_per_s=options.rate,
        num_requests=options.requests,
        length_scale=options.length_scale,
        spikes=tuple(options.spike),
        day=Day(options.day_s, options.day_low) if options.day_s is not None else None,
        embedding_share=options.embedding_share,
        seed=options.seed,
    )
    router = Router(
        local_prefill=not options.no_local_prefill,
        max_local_prefill_tokens=options.max_local_prefill_tokens,
        knows_objectives=not options.no_objectives,
    )
    scenario = Scenario(
        traffic=traffic,
        fleet=_fleet(options, traffic),
        router=router,
        goals=goals,
        failures=tuple(options.fail),
        scaled=_scaled(options),
        seed=options.seed,
        jumps=not options.step_by_step,
    )
    return scenario if options.prefill else _colocated(scenario)


def _fleet(options: argparse.Namespace, traffic: Traffic) -> Fleet:
    worker = _worker(options, traffic)
    drafts = None
    if options.draft_acceptance is not None:
        drafts = Drafts(options.draft_acceptance, options.num_speculative_tokens, options.draft_model_share)
        drafts.check()  # before room is divided by it
    elif options.draft_model_share:
        raise ConfigError("draft-model-share: without --draft-acceptance nothing is drafted")
    return replace(
        worker,
        prefill=options.prefill,
        decode=options.decode,
        steps=fit(read_samples(options.steps), noise=not options.no_noise) if options.steps else worker.steps,
        num_blocks=options.num_blocks,
        block_tokens=options.block_size or worker.block_tokens,
        max_num_seqs=options.max_num_seqs,
        prefill_tokens=options.prefill_tokens or worker.prefill_tokens,
        decode_tokens=options.decode_tokens or worker.decode_tokens,
        has_objective=not options.no_objectives,
        adapters=Adapters(options.adapters, round(options.adapter_mb * 1e6), options.max_loras, options.max_cpu_loras),
        drafts=drafts,
    )


def _worker(options: argparse.Namespace, traffic: Traffic) -> Fleet:
    """Return what a worker is: a model of published figures, or any other by its config.json and the flags for it."""
    if is_published(options.model):
        if named := [flag for flag, value in _checkpoint_flags().items() if getattr(options, flag) != value]:
            raise ConfigError(f"{named[0]}: {options.model} stands for published figures; name a model's directory")
        return Fleet(1, 1, gpu=options.gpu, model=options.model, gpus_per_worker=options.tensor_parallel_size)
    model, engine, gpu = read_worker(options)
    context = round(mean(row.num_prompt_tokens for row in rows_of(traffic)))
    sizer = Sizer(engine, model, gpu, min(context, model.longest_model_len))
    return fleet_of(sizer, link_bytes_per_s(options, gpu))


def _checkpoint_flags() -> dict[str, object]:
    """Return the flags that only a checkpoint takes, with their defaults."""
    parser = argparse.ArgumentParser()
    add_model_flags(parser.add_argument_group())
    return vars(parser.parse_args([]))


def _scaled(options: argparse.Namespace) -> Scaled | None:
    if options.autoscale is None:
        return None
    most = options.autoscale
    if most < options.prefill + options.decode:
        raise ConfigError(f"autoscale: at most {most}, but --prefill and --decode begin with more")
    pool = PoolBounds(at_least=1, at_most=most)
    config = AutoscaleConfig(
        mode="on", prefill=pool, decode=pool, max_workers=most, spare_workers=options.spare_workers
    )
    return Scaled(config, start_s=options.start_s)


def _spike(text: str) -> Spike:
    if (found := _SPIKE.fullmatch(text)) is None or not float(found[3]):
        raise argparse.ArgumentTypeError(f"{text!r} is not AT:SECONDS:FACTOR, as in 20:5:3")
    return Spike(float(found[1]), float(found[2]), float(found[3]))


def _failure(text: str) -> Failure:
    if (found := _FAILURE.fullmatch(text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WORKER@AT[+BACK_AFTER], as in decode-0@20+60")
    return Failure(found[1], float(found[2]), float(found[3]) if found[3] else None)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="kvferry simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_traffic(parser.add_argument_group("traffic"))
    _add_fleet(parser.add_argument_group("fleet"))
    add_model_flags(parser.add_argument_group("a checkpoint instead of published figures"))
    _add_goals(parser.add_argument_group("router and objectives"))
    group = parser.add_argument_group("run")
    group.add_argument("--capacity", action="store_true", help="search the highest rate at which --share is good")
    group.add_argument("--share", type=share, default=0.9, help="of requests, for --capacity and --oracle")
    group.add_argument("--oracle", action="store_true", help="also show the bound that no router can beat")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--step-by-step", action="store_true", help="every decode step is an event: slow, same results")
    group.add_argument("--json", type=output_file, metavar="FILE")
    group.add_argument("--plot", type=output_file, metavar="FILE", help=".svg or .png")
    return parser


def _add_traffic(group: argparse._ArgumentGroup) -> None:
    names = ", ".join(SOURCES)
    group.add_argument("--trace", default="sample:azure-2023-conv", help=f"{names}, sample:NAME, or a file")
    group.add_argument("--part", choices=("whole", "first", "second"), default="whole", help="of the trace's time")
    group.add_argument("--rate", type=positive_float, help="mean requests per second; default: as recorded")
    group.add_argument("--poisson", action="store_true", help="Poisson arrivals; default: the recorded ones, scaled")
    group.add_argument("--requests", type=positive_int, help="default: all; more than there are: again from the start")
    group.add_argument("--length-scale", type=positive_float, default=1.0)
    group.add_argument("--spike", type=_spike, action="append", default=[], metavar="AT:SECONDS:FACTOR")
    group.add_argument("--day-s", type=positive_float, help="a sinusoidal day of so many seconds")
    text = "of the requests that want their prompt's embedding instead of an answer"
    group.add_argument("--embedding-share", type=float, default=0.0, metavar="X", help=text)
    group.add_argument("--day-low", type=share, default=0.2, help="its lowest rate, as a share of the highest")


def _add_fleet(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prefill", type=natural, default=2, help="workers; 0: colocated")
    group.add_argument("--decode", type=positive_int, default=2, help="workers")
    group.add_argument("--gpu", default="H100", help=f"{', '.join(GPUS)}; with a checkpoint also {CPU}, measured")
    text = f"published figures: {', '.join(MODELS)}; or a checkpoint as of serve, whose config.json is enough"
    group.add_argument("--model", default="llama-3.1-70b", help=text)
    group.add_argument("--tensor-parallel-size", type=positive_int, default=4, help="GPUs of a worker")
    group.add_argument("--steps", type=Path, metavar="FILE", help="samples of a live worker's steps, instead of a GPU")
    group.add_argument("--no-noise", action="store_true", help="with --steps: every step takes what the fit says")
    group.add_argument("--num-blocks", type=positive_int, help="of a worker; default: what fits into its memory")
    group.add_argument("--block-size", type=positive_int, help="tokens; default: as states demand, the trace's, or 64")
    group.add_argument("--max-num-seqs", type=positive_int, default=256)
    group.add_argument("--prefill-tokens", type=positive_int, help="largest step of a prefill worker; default: 8192")
    group.add_argument("--decode-tokens", type=positive_int, help="largest step of a decode worker; default: 2048")
    group.add_argument("--adapters", type=natural, default=0, help="that requests name, few often and many rarely")
    group.add_argument("--adapter-mb", type=positive_float, default=100.0, help="of an adapter's file")
    group.add_argument("--max-loras", type=positive_int, default=8, help="adapters in a step, on each worker")
    group.add_argument("--max-cpu-loras", type=positive_int, help="in its host memory (default: --max-loras)")
    group.add_argument("--draft-acceptance", type=positive_float, help="chance of a drafted token after right ones")
    group.add_argument("--num-speculative-tokens", type=positive_int, default=5, help="drafted, with that, at most")
    text = "of a step that a draft model's takes, and of a token's KV; default: drafts cost nothing to make"
    group.add_argument("--draft-model-share", type=float, default=0.0, metavar="X", help=text)
    group.add_argument("--fail", type=_failure, action="append", default=[], metavar="WORKER@AT[+BACK_AFTER]")
    group.add_argument("--autoscale", type=positive_int, metavar="N", help="the autoscaler decides, up to N workers")
    group.add_argument("--start-s", type=positive_float, default=60.0, help="that a new worker takes to start")
    group.add_argument("--spare-workers", type=natural, default=0)


def _add_goals(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--policy", default="slo", help="one or more, with commas; also: colocated")
    group.add_argument("--no-local-prefill", action="store_true")
    group.add_argument("--max-local-prefill-tokens", type=natural, default=0)
    group.add_argument("--ttft-objective-ms", type=positive_float, default=1000.0)
    group.add_argument("--ttft-stretch", type=multiple, default=3.0)
    group.add_argument("--tpot-objective-ms", type=positive_float, default=50.0)
    text = "neither router nor workers are told them: they only say which requests are good"
    group.add_argument("--no-objectives", action="store_true", help=text)


if __name__ == "__main__":
    sys.exit(main())
