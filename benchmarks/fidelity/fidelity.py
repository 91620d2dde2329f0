"""Does the simulator say what really happens? The same scaled trace live on this machine and simulated.

    python -m kvferry.benchmarks.fidelity [--seconds 80] [--policies least_loaded,slo]

For each policy, on workers with one thread each (they lend each other no cores), with a router that writes down what
workers tell it of their steps (step_tap.py):
1. lone       requests of several lengths, one at a time. What they take beyond their simulation is a constant of this
              machine and these processes: HTTP, the router's loop, the way back to the client
2. learn      rows of the trace at the load. Steps that are measured here, with router and client on the same cores,
              become the simulator's (with the self-calibration, where they are few), transfers its network
3. measure    the rows after those, never seen before: live, to the token (`ignore_eos`)
4. simulate   the same rows with what was learned in 1 and 2, by production's own router and schedulers

The objective for first tokens is far away, so that hardly a request is refused: one that is refused here and not there
would change who is compared. The one for tokens is three times the unloaded time.

Shown: simulated / live for TTFT, TPOT and throughput; bar: p50 and throughput within 10 %, p99 within 25 %. Beside it,
held to nothing: the same with steps learned from the measured run itself, which tells a machine that has changed from a
simulator that is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import get_args

from kvferry.benchmarks.fidelity.report import Comparison, bars_of, draw
from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.live_load import (
    Objectives,
    add_load_flags,
    figures_of,
    measure_unloaded,
    read_rows,
    replay,
    requests_per_s,
    rows_at_rate,
)
from kvferry.benchmarks.shared.pools import Pools, parse_pools, pool_flags
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, names_of, parser_of
from kvferry.benchmarks.shared.step_tap import Tap, read_tap, tapped_serve
from kvferry.benchmarks.shared.twin import Machine, SimulatedFigures, lone_ttft_s, time_around, twin
from kvferry.benchmarks.shared.twin import figures_of as simulated_figures
from kvferry.common.errors import ConfigError
from kvferry.common.router_config import PolicyName
from kvferry.simulator import Scenario, quiet_simulation, simulate
from kvferry.tools.chaos.serve_system import System, serving
from kvferry.tools.load.arguments import output_file, positive_float
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.load import LoadResult
from kvferry.tools.load.plot import check_plot_path
from kvferry.tools.load.report import report_console
from kvferry.tools.load.traces import TraceRow

UNLOADED_LENS = (64, 512, 2048)
_LONE_LENS = (48, 160, 400, 700, 1200, 300, 900, 90) * 2
_LONE_OUTPUT = 8
_LONE_EVERY_S = 20.0  # in the simulation: nothing is left of the one before
_IN_FLIGHT = 8
_CAPACITY_S = 15.0
_SEEDS = 3  # of the simulation's noise; medians


@dataclass(slots=True)
class Live:
    """What one deployment has shown. Times are perf_counter seconds."""

    lone_ttft_s: list[float]
    lone: tuple[float, float]
    learn: tuple[float, float]
    measured: tuple[float, float]
    load: LoadResult


@dataclass(slots=True)
class Bench:
    """What both policies have in common."""

    flags: argparse.Namespace
    log_dir: Path
    rows: list[TraceRow]
    objectives: Objectives
    rate_per_s: float

    @property
    def learn_rows(self) -> list[TraceRow]:
        return rows_at_rate(self.rows, self.rate_per_s, self.flags.learn_s)

    @property
    def measured_rows(self) -> list[TraceRow]:
        return rows_at_rate(self.rows, self.rate_per_s, self.flags.seconds, skip=len(self.learn_rows))

    def run(self, policy: str) -> tuple[Comparison, Machine]:
        tap_path = self.log_dir / f"fidelity-{policy}.tap"
        tap_path.unlink(missing_ok=True)
        flags = (*common_flags(self.flags, self.flags.pools), "--policy", policy, *self.objectives.flags)
        with serving(f"fidelity-{policy}", self.flags.model, flags, self.log_dir, program=tapped_serve(tap_path)) as it:
            live = asyncio.run(self._measure(it))
        return self._compare(policy, live, read_tap(tap_path))

    async def _measure(self, system: System) -> Live:
        seed = self.flags.seed
        times = [perf_counter()]
        lone = [await replay(system, [row], seed=seed + number) for number, row in enumerate(lone_rows())]
        times.append(perf_counter())
        await replay(system, self.learn_rows, seed=seed + 100)
        times.append(perf_counter())
        load = await replay(system, self.measured_rows, seed=seed + 200)
        times.append(perf_counter())
        return Live(live_ttft_s(lone), (times[0], times[1]), (times[1], times[2]), (times[2], times[3]), load)

    def _compare(self, policy: str, live: Live, tap: Tap) -> tuple[Comparison, Machine]:
        machine = Machine.from_tap(tap.between(*live.learn))
        idle = Machine.from_tap(tap.between(*live.lone))  # steps are quicker where nothing else runs
        lone_s = lone_ttft_s(self._twin(idle, policy, lone_rows(_LONE_EVERY_S)))
        around_s = time_around(lone_s, live.lone_ttft_s)
        rows, answered = self.measured_rows, [record for record in live.load.records if record.is_ok]
        comparison = Comparison(
            policy=policy,
            pools=str(self.flags.pools),
            rate_per_s=self.rate_per_s,
            around_ms=around_s * 1e3,
            lone_ms=tuple((live_s * 1e3, s * 1e3) for live_s, s in zip(live.lone_ttft_s, lone_s, strict=True)),
            live=figures_of(live.load, rows, self.objectives, self.flags.seconds),
            simulated=self._simulate(machine, policy, rows, around_s),
            hindsight=self._simulate(Machine.from_tap(tap.between(*live.measured)), policy, rows, around_s),
            live_ttft_ms=tuple(record.ttft_s * 1e3 for record in answered if record.ttft_s is not None),
            live_tpot_ms=tuple(record.tpot_s * 1e3 for record in answered if record.tpot_s is not None),
        )
        return comparison, machine

    def _twin(
        self, machine: Machine, policy: str, rows: Sequence[TraceRow], around_s: float = 0.0, seed: int = 0
    ) -> Scenario:
        return twin(machine, rows, self.flags.pools, policy, self.objectives, around_s=around_s, seed=seed)

    def _simulate(
        self, machine: Machine, policy: str, rows: Sequence[TraceRow], around_s: float
    ) -> tuple[SimulatedFigures, ...]:
        return tuple(
            simulated_figures(
                simulate(self._twin(machine, policy, rows, around_s, seed)), self.objectives, self.flags.seconds
            )
            for seed in range(_SEEDS)
        )


def live_ttft_s(lone: Sequence[LoadResult]) -> list[float]:
    """First tokens of requests that came one at a time, in their order. Raises ConfigError where one has none."""
    records = [record for load in lone for record in load.records]
    known = [record.ttft_s for record in records if record.is_ok and record.ttft_s is not None]
    if len(known) < len(records):
        errors = ", ".join(sorted({str(record.error) for record in records if record.error is not None}))
        raise ConfigError(f"{len(records) - len(known)} of {len(records)} lone requests were not answered: {errors}")
    return known


def lone_rows(every_s: float = 0.0) -> list[TraceRow]:
    return [TraceRow(number * every_s, length, _LONE_OUTPUT) for number, length in enumerate(_LONE_LENS)]


def common_flags(flags: argparse.Namespace, pools: Pools) -> tuple[str, ...]:
    return (*pool_flags(pools), "--num-threads", "1", *flags.serve_flags.split())


def prepare(flags: argparse.Namespace, rows: list[TraceRow], log_dir: Path) -> tuple[Objectives, float]:
    """Unloaded times, and how many requests per second the pools answer in closed loop."""
    with serving("fidelity-idle", flags.model, common_flags(flags, flags.pools), log_dir) as system:
        unloaded = asyncio.run(measure_unloaded(system, UNLOADED_LENS, num_each=flags.unloaded, seed=flags.seed))
        rate = asyncio.run(
            requests_per_s(system, rows, in_flight=_IN_FLIGHT, seconds=flags.capacity_s, seed=flags.seed + 300)
        )
    return replace(Objectives.from_unloaded(unloaded), ttft_s=flags.ttft_s), rate


@benchmark("fidelity")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    check_plot_path(flags.plot)
    console = report_console()
    quiet_simulation()
    rows = read_rows(flags)
    comparisons: list[Comparison] = []
    machines: dict[str, Machine] = {}
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory() as folder:
        log_dir = flags.log_dir or Path(folder)
        objectives, capacity = prepare(flags, rows, log_dir)
        rate = flags.rate or flags.load * capacity
        console.print(f"{rate:.2f} requests/s; objectives: {' '.join(objectives.flags)}", style="dim")
        bench = Bench(flags, log_dir, rows, objectives, rate)
        for policy in flags.policies:
            comparison, machines[policy] = bench.run(policy)
            own = bars_of(comparison)
            console.print(bar_table(f"{policy}, {flags.pools} workers: simulated / live", own))
            comparisons.append(comparison)
            bars += own
    environment = describe_environment("python -m kvferry.benchmarks.fidelity", argv)
    body = {
        "environment": asdict(environment),
        "objectives": asdict(objectives),
        "capacity_per_s": capacity,
        "bars": [bar.as_json() for bar in bars],
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "machines": {policy: machine.as_json() for policy, machine in machines.items()},
    }
    save_json(body, flags.json)
    draw(comparisons, flags.plot, environment.git_commit or environment.kvferry_version)
    return exit_code(bars)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("fidelity", __doc__)
    add = parser.add_argument
    policies = names_of(get_args(PolicyName))
    add("--policies", type=policies, default="least_loaded,slo", metavar="NAMES", help="(default: %(default)s)")
    add("--pools", type=parse_pools, default="1+1", help="prefill+decode workers (default: %(default)s)")
    add("--seconds", type=positive_float, default=80.0, help="of arrivals, measured (default: %(default)g)")
    add("--learn-s", type=positive_float, default=40.0, help="of arrivals before (default: %(default)g)")
    add("--load", type=positive_float, default=0.6, help="of what closed loop answers (default: %(default)g)")
    add("--rate", type=positive_float, help="requests per second, instead of --load")
    add(
        "--ttft-s",
        type=positive_float,
        default=10.0,
        help="objective; far, that few are refused (default: %(default)g)",
    )
    add("--capacity-s", type=positive_float, default=_CAPACITY_S, help="of the closed loop (default: %(default)g)")
    add_load_flags(parser)
    add("--json", type=output_file, default=RESULTS_DIR / "fidelity.json")
    add("--plot", type=output_file, default=RESULTS_DIR / "fidelity.svg")
    return parser
