"""`kvferry simulate`: a fleet under a trace, in virtual time. One run for each policy that is named.

    kvferry simulate --trace azure-2023-conv --rate 20 --prefill 2 --decode 6 --policy slo,least_loaded

The router and the workers' schedulers are those that `kvferry serve` runs; the engines are models of their step times,
from published figures of a GPU and a model, or fitted to a live worker's steps (--steps).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import get_args

from ...common.errors import ConfigError, KVFerryError
from ...common.router_config import AutoscaleConfig, PolicyName, PoolBounds
from ...sizing.figures import Sizer
from ...sizing.shapes import is_published
from ...tools.load.delivery import deliver
from ...tools.load.environment import describe_environment
from ...tools.load.plot import check_plot_path
from ...tools.load.report import report_console
from ..costs.measured import fit, read_samples
from ..oracle import Bound, bound
from ..scenario import Adapters, Day, Drafts, Fleet, Goals, Router, Scaled, Scenario, Traffic
from ..simulate import at_rate, capacity, quiet_simulation, simulate
from ..traffic import rows_of
from .checkpoint import add_model_flags, fleet_of, link_bytes_per_s, read_worker
from .simulate_flags import check_needs, make_parser
from .simulate_report import Run, plot_runs, print_runs, save_runs

__all__ = ["main", "make_parser", "scenario_of"]  # the first two are what a program has

# Of what a run sets aside memory or time for, by flag: more is no fleet, and no machine simulates it.
_MOST: dict[str, float] = {"prefill": 10**5, "decode": 10**5, "tensor_parallel_size": 1024, "adapters": 10**6}
_MOST |= {"requests": 10**7, "spare_workers": 10**4, "length_scale": 1e6}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = make_parser().parse_args(words)
    quiet_simulation()
    try:
        if options.plot is not None:
            check_plot_path(options.plot)
        runs = [_run(name, options) for name in _policies(options.policy)]
        best = bound(runs[0][1], share=options.share) if options.oracle else None
    except KVFerryError as error:
        print(f"kvferry simulate: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    environment = describe_environment("kvferry simulate", words)
    files = (
        (options.json, lambda path: save_runs(runs, environment, path)),
        (options.plot, lambda path: plot_runs(runs, path)),
    )
    return deliver("kvferry simulate", files, lambda: _show(runs, best))


def _show(runs: Sequence[Run], best: Bound | None) -> None:
    console = report_console(file_width=180)
    print_runs(runs, console)
    if best is not None:
        console.print(
            f"Bound of an oracle: {best.goodput_per_s:.2f} good requests/s, {best.prefill_share:.0%} of the workers "
            f"for prompts; an infinite cache would hold {best.hit_rate:.1%} of their tokens"
        )


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
    return replace(scenario, fleet=replace(fleet, prefill=0, decode=fleet.num_workers), scaled=scaled)


def _check_failures(policy: str, scenario: Scenario) -> None:
    """Refuse to kill a worker that is never there. An autoscaler may start any."""
    counts = {"prefill": scenario.fleet.prefill, "decode": scenario.fleet.decode}
    for failure in scenario.failures:
        role, _, number = failure.worker.partition("-")
        if scenario.scaled is None and (int(number) >= counts[role] or number != str(int(number))):
            known = ", ".join(f"{role}-0 to {role}-{count - 1}" for role, count in counts.items() if count)
            raise ConfigError(f"fail: {policy} has no worker {failure.worker}: it has {known}")


def scenario_of(options: argparse.Namespace) -> Scenario:
    for name, most in _MOST.items():
        if (value := getattr(options, name)) is not None and value > most:
            raise ConfigError(f"{name}: {value:,} is more than {most:,}")
    check_needs(options)
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


if __name__ == "__main__":
    sys.exit(main())
