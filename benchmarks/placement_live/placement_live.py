"""Placement policies on this machine: goodput of a scaled-down production trace on the same number of workers.

    python -m kvferry.benchmarks.placement_live [--seconds 60] [--levels 0.8,1.0]

Three workers with one thread each. Systems: colocated (0+3), and for each of round_robin, least_loaded, kv_cost and slo
the better of the splits 1+2 and 2+1. The Mooncake conversation trace with lengths / 16, its arrivals stretched to the
rate (those of one tick of its clock, three seconds, spread over the tick), answers to the token. Every system meets
the same rows, and no cache has seen them.
1. idle        unloaded first tokens and token times, on one worker of each kind
2. capacity    what the colocated workers answer in closed loop: level 1.0
3. splits      a short run of every policy on every split at level 1.0; the better split stays
4. levels      every system at every level, in `--rounds` rounds through all of them, so that noise meets them all

Objectives, fixed before anything was measured: first token within max(1 s, 3 x the prompt's unloaded one), time per
token within 3 x the unloaded one; both met, the request is good. All routers know them and refuse what cannot be met.

Shown: goodput of each, and the ratio of `slo` to the best other and to colocated (bar here: >= 1, the simulation's
direction; the simulated fleet has the real bar). Beside it the goodput that the simulator expects of the same rows with
this machine's step times, and whether both put `slo` on the same side of the best other.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import get_args

from rich.console import Console

from kvferry.benchmarks.placement_live.report import COLOCATED, Run, Setting, bars_of, draw, run_table
from kvferry.benchmarks.shared.bars import bar_table, exit_code
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
from kvferry.benchmarks.shared.twin import Machine, twin
from kvferry.benchmarks.shared.twin import figures_of as simulated_figures
from kvferry.common.router_config import PolicyName
from kvferry.simulator import quiet_simulation, simulate
from kvferry.tools.chaos.serve_system import serving
from kvferry.tools.load.arguments import output_file, positive_float, positive_int
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.plot import check_plot_path
from kvferry.tools.load.report import report_console
from kvferry.tools.load.traces import TraceRow

POLICIES = ("round_robin", "least_loaded", "kv_cost", "slo")
_UNLOADED_LENS = (64, 512, 2048)
_IN_FLIGHT = 9


@dataclass(slots=True)
class Bench:
    """Everything that the runs have in common."""

    flags: argparse.Namespace
    log_dir: Path
    rows: list[TraceRow]
    console: Console
    objectives: Objectives | None = None
    capacity_per_s: float = 0.0
    taps: list[Tap] = field(default_factory=list)
    _number: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def known(self) -> Objectives:
        assert self.objectives is not None
        return self.objectives

    def serve_flags(self, setting: Setting) -> tuple[str, ...]:
        objectives = self.objectives.flags if self.objectives is not None else ()
        common = ("--num-threads", "1", "--policy", setting.router_policy, *self.flags.serve_flags.split())
        return (*pool_flags(setting.pools), *common, *objectives)

    def prepare(self) -> None:
        """Objectives, then the rate that is level 1.0."""
        flags, seed = self.flags, self.flags.seed
        with serving(
            "placement-idle", flags.model, self.serve_flags(Setting("least_loaded", Pools(1, 1))), self.log_dir
        ) as it:
            unloaded = asyncio.run(measure_unloaded(it, _UNLOADED_LENS, num_each=flags.unloaded, seed=seed))
        self.objectives = Objectives.from_unloaded(unloaded)
        if flags.capacity:
            self.capacity_per_s = flags.capacity
            return
        colocated = Setting(COLOCATED, Pools(0, flags.workers))
        with serving("placement-capacity", flags.model, self.serve_flags(colocated), self.log_dir) as it:
            options = {"in_flight": _IN_FLIGHT, "seconds": flags.capacity_s, "seed": seed + 1}
            self.capacity_per_s = asyncio.run(requests_per_s(it, self.rows, **options))

    def run(self, setting: Setting, level: float, seconds: float) -> Run:
        """One deployment, one load."""
        number = next(self._number)
        tap_path = self.log_dir / f"placement-{number}.tap"
        rows = self.rows_at(level, seconds)
        flags, name = self.serve_flags(setting), f"placement-{number}"
        with serving(name, self.flags.model, flags, self.log_dir, program=tapped_serve(tap_path)) as it:
            asyncio.run(replay(it, rows[: self.flags.workers], seed=self.flags.seed + 1000 + number))  # warm-up
            began_s = perf_counter()
            load = asyncio.run(replay(it, rows, seed=self.flags.seed + 2000))
            ended_s = perf_counter()
        self.taps.append(read_tap(tap_path).between(began_s, ended_s))
        figures = figures_of(load, rows, self.known, seconds)
        self.console.print(
            f"{setting} at {level:g}: {figures.num_good} of {figures.num_sent} good, {figures.num_refused} refused, "
            f"{figures.num_failed} failed",
            style="dim",
        )
        return Run(setting, level, figures)

    def rows_at(self, level: float, seconds: float) -> list[TraceRow]:
        return rows_at_rate(self.rows, level * self.capacity_per_s, seconds)

    def best_splits(self) -> tuple[list[Setting], list[Run]]:
        """Of every policy; and all that was tried."""
        tried = [
            self.run(Setting(policy, split), 1.0, self.flags.split_seconds)
            for policy in self.flags.policies
            for split in self.flags.splits
        ]
        best = {}
        for run in sorted(tried, key=lambda one: one.figures.num_good):
            best[run.setting.policy] = run.setting
        return [best[policy] for policy in self.flags.policies], tried

    def rounds(self, settings: Sequence[Setting]) -> list[Run]:
        found = []
        for number in range(self.flags.rounds):
            for level in self.flags.levels:
                # Every other round backwards: what drifts meets all alike.
                for setting in settings if number % 2 == 0 else reversed(settings):
                    found.append(self.run(setting, level, self.flags.seconds))
        return found

    def simulated(self, runs: Sequence[Run]) -> dict[tuple[Setting, float], float]:
        """Goodput of the same rows on the twins of the deployments, with the steps of all runs together."""
        machine = Machine.from_tap(_together(self.taps))
        expected = {}
        for setting, level in dict.fromkeys((run.setting, run.level) for run in runs):
            rows = self.rows_at(level, self.flags.seconds)
            outcome = simulate(twin(machine, rows, setting.pools, setting.router_policy, self.known))
            expected[setting, level] = simulated_figures(outcome, self.known, self.flags.seconds).goodput_per_s
        return expected


def _together(taps: Sequence[Tap]) -> Tap:
    return Tap(
        tuple(line for tap in taps for line in tap.hellos),
        tuple(line for tap in taps for line in tap.steps),
        tuple(line for tap in taps for line in tap.transfers),
    )


def measure(bench: Bench) -> tuple[list[Run], list[Run], dict[tuple[Setting, float], float]]:
    bench.prepare()
    bench.console.print(
        f"level 1.0: {bench.capacity_per_s:.2f} requests/s; objectives: {' '.join(bench.known.flags)}", style="dim"
    )
    settings, tried = bench.best_splits()
    runs = bench.rounds([Setting(COLOCATED, Pools(0, bench.flags.workers)), *settings])
    return runs, tried, bench.simulated(runs) if bench.flags.simulate else {}


@benchmark("placement_live")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    check_plot_path(flags.plot)
    console = report_console()
    quiet_simulation()
    rows = read_rows(flags)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(flags, flags.log_dir or Path(folder), rows, console)
        runs, tried, expected = measure(bench)
    console.print(run_table(runs, expected))
    bars = bars_of(runs, expected, tried)
    console.print(bar_table("slo beside the others", bars))
    environment = describe_environment("python -m kvferry.benchmarks.placement_live", argv)
    body = {
        "environment": asdict(environment),
        "objectives": asdict(bench.known),
        "capacity_per_s": bench.capacity_per_s,
        "bars": [bar.as_json() for bar in bars],
        "runs": [asdict(run) for run in runs],
        "splits_tried": [asdict(run) for run in tried],
        "simulated_goodput_per_s": [
            {"setting": str(setting), "level": level, "goodput_per_s": value}
            for (setting, level), value in expected.items()
        ],
    }
    save_json(body, flags.json)
    draw(runs, expected, flags.plot, environment.git_commit or environment.kvferry_version)
    return exit_code(bars)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("placement_live", __doc__)
    add = parser.add_argument
    policies, text = names_of(get_args(PolicyName)), "besides colocated (default: %(default)s)"
    add("--policies", type=policies, default=",".join(POLICIES), metavar="NAMES", help=text)
    add("--workers", type=positive_int, default=3, help="of the colocated system (default: %(default)s)")
    add("--splits", type=lambda text: [parse_pools(part) for part in text.split(",")], default="1+2,2+1",
        help="of the others (default: %(default)s)")  # fmt: skip
    add("--levels", type=lambda text: [positive_float(part) for part in text.split(",")], default="0.8,1.0",
        help="of the capacity (default: %(default)s)")  # fmt: skip
    add("--seconds", type=positive_float, default=60.0, help="of arrivals in each run (default: %(default)g)")
    add("--split-seconds", type=positive_float, default=25.0, help="the same, to choose splits (default: %(default)g)")
    add("--rounds", type=positive_int, default=1, help="through all systems (default: %(default)s)")
    add("--capacity", type=positive_float, help="requests per second of level 1.0, instead of measuring them")
    add("--capacity-s", type=positive_float, default=20.0, help="of the closed loop (default: %(default)g)")
    add("--simulate", action=argparse.BooleanOptionalAction, default=True, help="also what the simulator expects")
    add_load_flags(parser)
    add("--json", type=output_file, default=RESULTS_DIR / "placement-live.json")
    add("--plot", type=output_file, default=RESULTS_DIR / "placement-live.svg")
    return parser
