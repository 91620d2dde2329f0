"""Runs the GPU's proofs: each part in its time, then the table and the JSON. Started by gpu_check.py."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter

from rich.console import Console

from kvferry.benchmarks import gpu_check
from kvferry.benchmarks.gpu.host import WHEELS, facts, missing, why_no_gpu
from kvferry.benchmarks.gpu.parts import PARTS, Finished, Part
from kvferry.benchmarks.gpu.report import GpuReport, PartResult, Verdict, print_gpu, write_gpu
from kvferry.benchmarks.shared.program import RESULTS_DIR, names_of
from kvferry.common.clock import Clock, SystemClock
from kvferry.common.config import environment
from kvferry.common.errors import ConfigError
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.report import report_console
from kvferry.tools.load.server_process import running

NO_GPU_EXIT_CODE = 3
_DEFAULT_TOTAL_S = 480.0
_END_S = 10.0  # for a part to end by itself when its time is up; out of the next one's time


class TimePlan:
    """Until when each part has to be over: by its share of the whole. What a part leaves goes to the next."""

    def __init__(self, parts: Sequence[Part], total_s: float, clock: Clock) -> None:
        self._clock = clock
        self._ends: dict[str, float] = {}
        total_share, share, start = sum(part.share for part in parts), 0.0, clock.now()
        for part in parts:
            share += part.share
            self._ends[part.name] = start + total_s * share / total_share

    def limit_s(self, part: Part) -> float:
        """Seconds that the part may take if it starts now."""
        return max(0.0, self._ends[part.name] - self._clock.now())


def run_parts(
    parts: Sequence[Part],
    plan: TimePlan,
    log_dir: Path,
    env: Mapping[str, str],
    console: Console,
    *,
    end_s: float = _END_S,
    on_result: Callable[[Sequence[PartResult]], None] = lambda results: None,
) -> list[PartResult]:
    """Every part in turn; nothing of one is left when the next starts. `on_result` gets all results after each part."""
    results: list[PartResult] = []
    for part in parts:
        console.print(f"{part.name}: {part.about}", style="dim", highlight=False)
        limit_s, began_s = plan.limit_s(part), perf_counter()
        verdict = _run_part(part, limit_s, end_s, log_dir, env)
        elapsed_s = round(perf_counter() - began_s, 1)
        results.append(PartResult(part.name, part.about, verdict, elapsed_s, round(limit_s, 1)))
        console.print(f"{part.name}: {verdict.status}: {verdict.reason}", style="dim", markup=False, soft_wrap=True)
        on_result(results)
    return results


def _run_part(part: Part, limit_s: float, end_s: float, log_dir: Path, env: Mapping[str, str]) -> Verdict:
    if absent := missing(part.needs, env):
        return Verdict("skipped", f"not here: {', '.join(absent)}")
    if limit_s <= end_s:
        return Verdict("skipped", "the parts before it took its time")
    output = log_dir / f"{part.name}.out"
    try:
        with running(part.name, part.command(output), log_dir, term_s=end_s) as process:
            returncode = process.wait(limit_s)
        return part.judge(Finished(returncode, output, process.log_tail(), limit_s))
    except ConfigError as error:
        return Verdict("fail", str(error))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    flags = _parser().parse_args(argv)
    # A plain end would leave a part's servers running: this one runs every `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    env, console = environment(), Console(stderr=True)
    if reasons := why_no_gpu(env):
        _tell_missing(reasons, env, console)
        return NO_GPU_EXIT_CODE
    parts = [part for part in PARTS if part.name in flags.parts]
    log_dir = flags.log_dir or Path(tempfile.mkdtemp(prefix="gpu-check-"))
    report = check(parts, flags.total, log_dir, argv, env, console, flags.json)
    print_gpu(report, report_console())
    console.print(f"written: {flags.json}; the parts' output: {log_dir}", style="dim")
    return 0 if report.is_proven else 1


def check(
    parts: Sequence[Part],
    total_s: float,
    log_dir: Path,
    argv: Sequence[str],
    env: Mapping[str, str],
    console: Console,
    path: Path,
) -> GpuReport:
    """Run the parts, and write to `path` after each: a later one may take this program with it."""
    plan, began_s = TimePlan(parts, total_s, SystemClock()), perf_counter()
    known, found = facts(env), describe_environment("python -m kvferry.benchmarks.gpu_check", argv)

    def report(results: Sequence[PartResult]) -> GpuReport:
        return GpuReport(known, round(perf_counter() - began_s, 1), tuple(results), found, len(parts))

    def write(results: Sequence[PartResult]) -> None:
        write_gpu(report(results), path)

    return report(run_parts(parts, plan, log_dir, env, console, on_result=write))


def _tell_missing(reasons: Sequence[str], env: Mapping[str, str], console: Console) -> None:
    console.print("no GPU to check on, so nothing is written:", style="red")
    packages = missing(("toolkit", *WHEELS), env)
    for line in [*reasons, *(f"not here: {name}" for name in packages)]:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu_check.py",
        description=(gpu_check.__doc__ or "").partition("\n")[0],
        epilog="; ".join(f"{part.name}: {part.about}" for part in PARTS),
    )
    add, names = parser.add_argument, [part.name for part in PARTS]
    add("--parts", type=names_of(names), default=names, help=f"some of {','.join(names)} (default: all)")
    add("--total", type=float, default=_DEFAULT_TOTAL_S, metavar="S", help="for all parts (default: %(default)g)")
    add("--log-dir", type=Path, metavar="DIR", help="for the parts' output (default: a new temporary directory)")
    add("--json", type=Path, default=RESULTS_DIR / "gpu.json", metavar="FILE", help="(default: %(default)s)")
    return parser
