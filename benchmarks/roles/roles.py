"""Three workers in the wrong split at high load: how soon do role changes bring the best split's goodput?

    python -m kvferry.benchmarks.roles [--cases decode,prefill] [--seconds 90]

decode     short prompts, longer answers. Best: 1 prefill + 2 decode; started as 2 + 1
prefill    long prompts, short answers. Best: 2 prefill + 1 decode; started as 1 + 2
Workers have one thread each, a few rows in a step, and no local prompts (`--no-local-prefill`): the split decides.
With `--autoscale on` and no bounds the fleet stays at three workers: all that can change is who does what.

For each case, under the same arrivals (Poisson, at a share of what the best split answers in closed loop):
1. best     the best split, `--autoscale off`
2. wrong    the wrong split, `--autoscale on`
3. stuck    the wrong split, `--autoscale off`: what there is to win

A request is good if its first token comes within max(1 s, 3 x unloaded) and its tokens take at most 3 x as long as on
an idle system; the unloaded times are measured first. Goodput is counted in windows of 5 s by the time of arrival.
Shown: when the wrong split had 90 % of the best one's goodput (bar: 60 s), its goodput after that time (bar: 90 %), and
how many requests failed (bar: 0; refusals, 429, are not good and no failures).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kvferry.benchmarks.roles.report import Case, RoleChange, Run, Sent, bars_of, draw
from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.live_load import (
    REFUSALS,
    Objectives,
    Unloaded,
    add_system_flags,
    add_unloaded_flag,
    measure_unloaded,
    replay,
    requests_per_s,
)
from kvferry.benchmarks.shared.pools import Pools, pool_flags
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, names_of, parser_of
from kvferry.common.clock import wall_time_s
from kvferry.tools.chaos.serve_system import System, serving
from kvferry.tools.load.arguments import output_file, positive_float, positive_int
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.load import poisson_arrivals
from kvferry.tools.load.plot import check_plot_path
from kvferry.tools.load.report import report_console
from kvferry.tools.load.traces import TraceRow

_WARM_UP_S = 2.0
_CAPACITY_S = 10.0
_MANY = 4000


@dataclass(slots=True, frozen=True)
class Kind:
    """A load that wants one split and is given the other."""

    num_prompt_tokens: int
    num_output_tokens: int
    best: Pools
    wrong: Pools

    @property
    def in_words(self) -> str:
        return f"{self.num_prompt_tokens} tokens in, {self.num_output_tokens} out"


KINDS = {
    "decode": Kind(32, 96, best=Pools(1, 2), wrong=Pools(2, 1)),
    "prefill": Kind(768, 4, best=Pools(2, 1), wrong=Pools(1, 2)),
}


@dataclass(slots=True)
class Bench:
    """What all runs have in common."""

    flags: argparse.Namespace
    log_dir: Path
    unloaded: Unloaded
    objectives: Objectives

    def serve_flags(self, pools: Pools, *, autoscale: bool) -> tuple[str, ...]:
        flags = (*common_flags(self.flags, pools), *self.objectives.flags)
        return (*flags, "--autoscale", "on", *self.flags.scale_flags.split()) if autoscale else flags

    def run_case(self, name: str, kind: Kind) -> Case:
        seconds = self.flags.seconds
        with serving(
            f"{name}-best", self.flags.model, self.serve_flags(kind.best, autoscale=False), self.log_dir
        ) as it:
            rate = self.flags.load * asyncio.run(self._capacity(it, kind))
            arrivals = list(itertools.takewhile(lambda at_s: at_s < seconds, poisson_arrivals(rate, self.flags.seed)))
            best = asyncio.run(self._run(it, "best", kind.best, kind, arrivals))
        with serving(
            f"{name}-wrong", self.flags.model, self.serve_flags(kind.wrong, autoscale=True), self.log_dir
        ) as it:
            wrong = asyncio.run(self._run(it, "wrong", kind.wrong, kind, arrivals))
        stuck = None
        if self.flags.stuck:
            half = [at_s for at_s in arrivals if at_s < seconds / 2]
            flags = self.serve_flags(kind.wrong, autoscale=False)
            with serving(f"{name}-stuck", self.flags.model, flags, self.log_dir) as it:
                stuck = asyncio.run(self._run(it, "stuck", kind.wrong, kind, half))
        load = f"{kind.in_words}, {rate:.2f} requests/s"
        return Case(name, load, seconds, self.flags.window_s, best, wrong, stuck)

    async def _capacity(self, system: System, kind: Kind) -> float:
        rows = [TraceRow(0.0, kind.num_prompt_tokens, kind.num_output_tokens)] * _MANY
        in_flight = 2 * self.flags.max_num_seqs + 2
        options = {"in_flight": in_flight, "seed": self.flags.seed + 1}
        await requests_per_s(system, rows, seconds=_WARM_UP_S, **options)
        options["seed"] += 1
        return await requests_per_s(system, rows, seconds=min(_CAPACITY_S, self.flags.seconds), **options)

    async def _run(self, system: System, name: str, pools: Pools, kind: Kind, arrivals: Sequence[float]) -> Run:
        rows = [TraceRow(at_s, kind.num_prompt_tokens, kind.num_output_tokens) for at_s in arrivals]
        began_s = wall_time_s()
        load = await replay(system, rows, seed=self.flags.seed + 3)
        sent = tuple(
            Sent(
                rows[record.index].arrival_s,
                self.objectives.is_good(record, kind.num_prompt_tokens),
                not record.is_ok and record.status not in REFUSALS,
            )
            for record in load.records
        )
        changes = tuple(
            RoleChange(line.at_s - began_s, str(line.fields["worker_id"]), str(line.fields["role"]))
            for line in system.lines("role_set", began_s)
        )
        return Run(name, str(pools), sent, changes)


def common_flags(flags: argparse.Namespace, pools: Pools) -> tuple[str, ...]:
    return (
        *pool_flags(pools),
        *("--policy", flags.policy, "--num-threads", "1", "--max-num-seqs", str(flags.max_num_seqs)),
        "--no-local-prefill",
        *flags.serve_flags.split(),
    )


def measure_idle(flags: argparse.Namespace, log_dir: Path) -> Unloaded:
    """On one worker of each kind."""
    lengths = sorted({kind.num_prompt_tokens for kind in KINDS.values()})
    with serving("unloaded", flags.model, common_flags(flags, Pools(1, 1)), log_dir) as system:
        return asyncio.run(measure_unloaded(system, lengths, num_each=flags.unloaded, seed=flags.seed))


@benchmark("roles")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    check_plot_path(flags.plot)
    console = report_console()
    cases: list[Case] = []
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory() as folder:
        log_dir = flags.log_dir or Path(folder)
        unloaded = measure_idle(flags, log_dir)
        bench = Bench(flags, log_dir, unloaded, Objectives.from_unloaded(unloaded))
        console.print(f"objectives: {' '.join(bench.objectives.flags)}", style="dim")
        for name in flags.cases:
            case = bench.run_case(name, KINDS[name])
            own = bars_of(case)
            console.print(bar_table(f"{name}: {case.load}; started as {case.wrong.pools}, best {case.best.pools}", own))
            for change in case.wrong.changes:
                console.print(f"  {change.at_s:.1f} s: {change.worker_id} is {change.role} from now on", style="dim")
            cases.append(case)
            bars += own
    environment = describe_environment("python -m kvferry.benchmarks.roles", argv)
    body = {
        "environment": asdict(environment),
        "objectives": asdict(bench.objectives),
        "bars": [bar.as_json() for bar in bars],
        "cases": [{**asdict(case), "goodput": _series(case)} for case in cases],
    }
    save_json(body, flags.json)
    draw(cases, flags.plot, environment.git_commit or environment.kvferry_version)
    return exit_code(bars)


def _series(case: Case) -> dict[str, list[tuple[float, float]]]:
    return {run.name: case.goodput(run) for run in (case.best, case.wrong, case.stuck) if run is not None}


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("roles", __doc__)
    add = parser.add_argument
    cases = f"some of {','.join(KINDS)} (default: all)"
    add("--cases", type=names_of(KINDS), default=tuple(KINDS), metavar="NAMES", help=cases)
    add("--seconds", type=positive_float, default=90.0, help="of load on each deployment (default: %(default)g)")
    add("--window-s", type=positive_float, default=5.0, help="(default: %(default)g)")
    add("--load", type=positive_float, default=0.75, help="of what the best split can answer (default: %(default)g)")
    add("--max-num-seqs", type=positive_int, default=4, help="rows in a step (default: %(default)s)")
    add(
        "--stuck", action=argparse.BooleanOptionalAction, default=True, help="also the wrong split without role changes"
    )
    add("--policy", default="slo", help="(default: %(default)s)")
    add("--scale-flags", default="", metavar="TEXT", help="further flags beside --autoscale on, in one argument")
    add_unloaded_flag(parser)
    add_system_flags(parser)
    add("--json", type=output_file, default=RESULTS_DIR / "roles.json")
    add("--plot", type=output_file, default=RESULTS_DIR / "roles.svg")
    return parser
