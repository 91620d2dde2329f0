"""Runs seeds until a number of requests is reached; says on a breach how to see it again, and with how few faults.

python -m kvferry.tests.simulation --seed 17 --trace          one scenario, every event of it
python -m kvferry.tests.simulation --seed 17 --shrink         the same breach with as few faults as it takes
python -m kvferry.tests.simulation --requests 2000000 --processes 2
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from .breach import Breach
from .scenario import Scenario, draw
from .tally import Tally
from .world import World


@dataclass(slots=True)
class Failure:
    """A breach, and how to see it again."""

    seed: int
    invariant: str
    text: str

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.text}\n  python -m kvferry.tests.simulation --seed {self.seed} --trace"


@dataclass(slots=True)
class Report:
    tally: Tally = field(default_factory=Tally)
    failures: list[Failure] = field(default_factory=list)
    num_seeds: int = 0
    seconds: float = 0.0


@contextmanager
def quiet() -> Iterator[None]:
    """The product's logs go nowhere meanwhile."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)


def run_seed(seed: int) -> Tally:
    """Raises Breach."""
    return World(draw(seed)).run()


def find_breach(seeds: Iterable[int]) -> Failure | None:
    """The first breach that these seeds show."""
    with quiet():
        for seed in seeds:
            try:
                run_seed(seed)
            except Breach as breach:
                return Failure(seed, breach.invariant, str(breach))
    return None


def run_requests(number: int, first_seed: int, stride: int = 1, *, stop_after: int = 10) -> Report:
    """Seeds from `first_seed` on, every `stride`-th, until so many requests were simulated."""
    report, began = Report(), time.perf_counter()
    with quiet():
        for seed in itertools.count(first_seed, stride):
            try:
                report.tally.add(run_seed(seed))
            except Breach as breach:
                report.failures.append(Failure(seed, breach.invariant, str(breach)))
            report.num_seeds += 1
            if report.tally.num_requests >= number or len(report.failures) >= stop_after:
                break
    report.seconds = time.perf_counter() - began
    return report


def run_parallel(number: int, first_seed: int, processes: int) -> Report:
    """The same on several cores: each process takes its own residue of the seeds."""
    if processes == 1:
        return run_requests(number, first_seed)
    jobs = [(number // processes, first_seed + index, processes) for index in range(processes)]
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        parts = pool.starmap(run_requests, jobs)
    whole = Report(seconds=time.perf_counter() - began)
    for part in parts:
        whole.tally.add(part.tally)
        whole.failures += part.failures
        whole.num_seeds += part.num_seeds
    return whole


def shrink(scenario: Scenario, breach: Breach) -> tuple[Scenario, Breach]:
    """Leave out faults, one after the other, as long as the same invariant breaks."""
    index = 0
    while index < len(scenario.faults):
        smaller = scenario.without(frozenset({index}))
        try:
            World(smaller).run()
        except Breach as again:
            if again.invariant == breach.invariant:
                scenario, breach = smaller, again
                continue
        index += 1
    return scenario, breach


def render(report: Report) -> str:
    tally = report.tally
    lines = [
        f"{tally.num_requests} requests, {report.num_seeds} seeds, {tally.num_events} events "
        f"in {report.seconds:.1f} s: {tally.num_requests / max(report.seconds, 1e-9):.0f} requests/s",
        f"{sum(tally.faults.values())} faults, {len(report.failures)} breaches",
    ]
    for title, counter in (("ends", tally.ends), ("faults", tally.faults), ("seen", tally.seen)):
        lines.append(f"{title}:")
        lines += [f"  {count:9d}  {name}" for name, count in sorted(counter.items())]
    return "\n".join([*lines, *map(str, report.failures)])


def _run_one(seed: int, *, trace: bool, shrinks: bool, faulted: bool) -> int:
    scenario = draw(seed, faulted=faulted)
    failed = False
    with quiet():
        try:
            tally = World(scenario, trace=None if shrinks or not trace else print).run()
        except Breach as breach:
            failed = True
            if shrinks:
                scenario, breach = shrink(scenario, breach)
                if trace:
                    try:
                        World(scenario, trace=print).run()
                    except Breach as again:
                        breach = again
            print(f"{breach}")
            if breach.__cause__ is not None and breach.invariant == "crash":
                sys.excepthook(type(breach.__cause__), breach.__cause__, breach.__cause__.__traceback__)
        else:
            print(f"seed {seed}: {tally.num_requests} requests, {tally.num_events} events, no breach")
    print(*scenario.faults, sep="\n")
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="kvferry.tests.simulation", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--seed", type=int, help="run this seed alone")
    parser.add_argument("--trace", action="store_true", help="print every message and fault")
    parser.add_argument("--shrink", action="store_true", help="leave out the faults that a breach does not need")
    parser.add_argument("--calm", action="store_true", help="with --seed: without faults")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    if args.seed is not None:
        return _run_one(args.seed, trace=args.trace, shrinks=args.shrink, faulted=not args.calm)
    report = run_parallel(args.requests, args.first_seed, args.processes)
    print(render(report))
    return int(bool(report.failures))
