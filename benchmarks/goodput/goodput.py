"""Goodput under objectives on recorded traces: kvferry's policy beside four others on the same simulated GPUs.

    for each trace   every system at its best split: the highest rate at which 90 % of requests meet both objectives
                     an oracle's bound on the same GPUs
                     all systems at 50, 80 and 100 % of the best baseline's rate

What is held fixed is in `setup.py`; the simulator runs production's router and schedulers in virtual time
(`kvferry.simulator`). Baselines are shown as published, where every request is admitted and served in
the order of arrival; two of them also behind this router's admission, which refuses what cannot be met.

    python -m kvferry.benchmarks.goodput                 # all three traces, their second halves
    python -m kvferry.benchmarks.goodput --part first    # what policies were tuned on
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace

from kvferry.benchmarks.goodput.report import Level, TraceResult, bars, plot_goodput, print_goodput
from kvferry.benchmarks.goodput.search import Bench, Best, System
from kvferry.benchmarks.goodput.setup import SETUP
from kvferry.benchmarks.shared.bars import exit_code
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.simulator import quiet_simulation, simulate
from kvferry.tools.load.arguments import output_file, positive_int
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.plot import check_plot_path


def search(task: tuple[Bench, str, bool, float]) -> Best:
    """One system's best split, in a process of its own."""
    quiet_simulation()
    bench, name, admits, guess = task
    setup = bench.setup
    if name == "colocated":
        return bench.best_chunk(guess, admits=admits)
    starts = (setup.num_workers * 3 // 4, setup.num_workers // 2)
    return bench.best_split(lambda p: System(name, p, setup.num_workers - p, admits=admits), starts, guess)


def level(task: tuple[Bench, System, float]) -> Level:
    quiet_simulation()
    bench, system, rate = task
    outcome = simulate(bench.scenario(system, rate))
    return Level(
        system=system,
        rate_per_s=rate,
        attainment=outcome.attainment,
        goodput_per_s=outcome.goodput_per_s,
        ttft_p50_ms=outcome.ttft_ms.p50,
        ttft_p90_ms=outcome.ttft_ms.p90,
        tpot_p50_ms=outcome.tpot_ms.p50,
        tpot_p90_ms=outcome.tpot_ms.p90,
        hit_rate=outcome.hit_rate,
    )


def tasks(bench: Bench) -> Iterator[tuple[Bench, str, bool, float]]:
    guess = bench.ceiling_per_s() / 2.5
    yield bench, SETUP.policy, True, guess
    for name in SETUP.baselines:
        yield bench, name, False, guess / 2
    for name in ("colocated", "kv_cost"):  # the strongest, with what this router adds
        yield bench, name, True, guess / 2


def run(benches: list[Bench], num_processes: int, num_level_requests: int | None) -> list[TraceResult]:
    results = []
    with ProcessPoolExecutor(num_processes) as pool:
        searches = [list(tasks(bench)) for bench in benches]
        found = iter(list(pool.map(search, [task for one in searches for task in one])))
        for bench, one in zip(benches, searches, strict=True):
            best = tuple(next(found) for _ in one)
            partial = TraceResult(bench.trace, bench.part, bench.ceiling_per_s(), best, ())
            highest = partial.strongest.rate_per_s  # 0: no baseline keeps the objectives at any rate
            rates = [share * highest for share in SETUP.levels] if highest else []
            shown = replace(bench, num_requests=num_level_requests)
            levels = tuple(pool.map(level, [(shown, b.system, rate) for b in best for rate in rates]))
            results.append(TraceResult(bench.trace, bench.part, partial.ceiling_per_s, best, levels))
    return results


@benchmark("goodput")
def main(argv: list[str]) -> int:
    parser = parser_of("goodput", __doc__)
    parser.add_argument("--traces", nargs="+", default=list(SETUP.traces), help="names or paths")
    parser.add_argument("--part", choices=("whole", "first", "second"), default="second")
    parser.add_argument("--requests", type=positive_int, default=None, help="of each trace, to search on; default: all")
    parser.add_argument("--level-requests", type=positive_int, default=None, help="to show; default: all")
    parser.add_argument("--processes", type=positive_int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=output_file, default=RESULTS_DIR / "goodput.json")
    parser.add_argument("--plot", type=output_file, default=RESULTS_DIR / "goodput.svg")
    args = parser.parse_args(argv)
    check_plot_path(args.plot)
    benches = [Bench(SETUP, trace, args.part, args.requests) for trace in args.traces]
    results = run(benches, args.processes, args.level_requests)
    print_goodput(results)
    body = {
        "environment": asdict(describe_environment(parser.prog, argv)),
        "setup": asdict(SETUP),
        "num_requests": args.requests,
        "num_level_requests": args.level_requests,
        "bars": [bar.as_json() for bar in bars(results)],
        "traces": [asdict(result) for result in results],
    }
    save_json(body, args.json)
    plot_goodput(results, args.plot)  # now that the tree's state is noted, of which pictures are a part
    return exit_code(bars(results))
