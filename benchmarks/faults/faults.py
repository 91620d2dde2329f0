"""What a failure costs those who are reading, and what safety costs when nothing fails.

    python -m kvferry.benchmarks.faults [--parts aborts,gap,overload,cost]

aborts     10,000 clients leave at random moments: do all blocks come back, and how soon?      (aborts.py)
gap        a decode worker dies under running streams: how long do they pause?                 (gap.py)
overload   five times more requests than can be served: is the work that is done still good?   (overload.py)
cost       checksums and grant signatures on a healthy run, against the same build without     (cost.py)

`aborts` and `gap` use a tiny random model on three and five processes, `overload` and `cost` the built-in one. Every
figure has its bar beside it; the exit code is 1 where one is missed. `kvferry chaos` is the other half: there workers
die all the time and every answer is compared with an undisturbed one.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from kvferry.benchmarks.faults.aborts import AbortResult, measure_aborts
from kvferry.benchmarks.faults.cost import CostResult, measure_cost
from kvferry.benchmarks.faults.gap import GapResult, measure_gaps
from kvferry.benchmarks.faults.overload import TTFT_OBJECTIVE_MS, OverloadResult, measure_overload
from kvferry.common.errors import ConfigError
from kvferry.models.default import default_model_dir
from kvferry.tools.chaos.serve_system import System, serving
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import RESULTS_DIR, report_console
from kvferry.tools.load.tiny_model import write_tiny_model

PARTS = ("aborts", "gap", "overload", "cost")
_COST_LENS = "128,512,2048"

_HANDOFFS = ("--policy", "least_loaded")  # every prompt is handed over


@dataclass(slots=True, frozen=True)
class Row:
    """One figure beside its bar."""

    part: str
    what: str
    value: float | None
    bar: float
    at_least: bool = False  # else: at most
    unit: str = "ms"
    count: int | None = None

    @property
    def is_met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.bar if self.at_least else self.value <= self.bar


@dataclass(slots=True, frozen=True)
class Options:
    num_aborts: int
    num_timed: int
    num_kills: int
    num_hangs: int
    overload_s: float
    num_pairs: int
    cost_lens: tuple[int, ...]
    seed: int
    log_dir: Path


@contextmanager
def _tiny(name: str, options: Options, *flags: str) -> Iterator[System]:
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_tiny_model(Path(folder) / "tiny")
        with serving(name, model_dir, flags, options.log_dir) as system:
            yield system


def _aborts(options: Options) -> tuple[AbortResult, list[Row]]:
    with _tiny(
        "aborts", options, "--policy", "least_loaded", "--prefill", "1", "--decode", "1", "--max-num-seqs", "32"
    ) as system:
        result = asyncio.run(
            measure_aborts(system, num_aborts=options.num_aborts, num_timed=options.num_timed, seed=options.seed)
        )
    after_ms = None if result.free_after_s is None else result.free_after_s * 1e3
    return result, [
        Row("aborts", "all blocks free after the last abort", after_ms, 1000, count=result.num_aborts),
        Row("aborts", "release after a disconnect, p99", result.release_ms.p99, 250, count=result.release_ms.count),
    ]


def _gap(options: Options) -> tuple[GapResult, list[Row]]:
    with _tiny("gap", options, *_HANDOFFS, "--prefill", "2", "--decode", "2") as system:
        result = asyncio.run(
            measure_gaps(system, num_kills=options.num_kills, num_hangs=options.num_hangs, seed=options.seed)
        )
    recompute_ms = result.recompute_ms.p99 or 0.0
    return result, [
        Row("gap", "streams that broke", result.num_broken, 0, unit="", count=result.num_kills),
        Row("gap", "pause at the death of the decode worker, p50", result.gap_ms.p50, 400, count=result.gap_ms.count),
        Row("gap", "the same, p99", result.gap_ms.p99, 1000 + recompute_ms, count=result.gap_ms.count),
        Row("gap", "death noticed, max", result.death_ms.max, 300, count=result.death_ms.count),
        Row("gap", "hang noticed, max", result.hang_ms.max, 3500, count=result.hang_ms.count),
        Row("gap", "other side of a failed transfer knows, max", result.transfer_ms.max, 100,
            count=result.transfer_ms.count),
    ]  # fmt: skip


def _overload(options: Options) -> tuple[OverloadResult, list[Row]]:
    objective = ("--ttft-objective-ms", str(TTFT_OBJECTIVE_MS))
    flags = ("--prefill", "1", "--decode", "1", "--no-enable-prefix-caching", *objective)
    with serving("overload", default_model_dir(), flags, options.log_dir) as system:
        result = asyncio.run(measure_overload(system, duration_s=options.overload_s, seed=options.seed))
    single, over = result.single, result.overload
    before, after = result.memory_mib
    return result, [
        Row("overload", "goodput at 5x / at 1x", over.goodput_per_s / single.goodput_per_s, 0.95, True, ""),
        Row("overload", "refusal, p99", over.refusal_ms.p99, 20, count=over.refusal_ms.count),
        Row("overload", "TTFT of admitted, p99", over.ttft_ms.p99, TTFT_OBJECTIVE_MS, count=over.ttft_ms.count),
        Row("overload", "requests neither answered nor refused", over.num_failed, 0, unit="", count=over.num_sent),
        Row("overload", "memory after / before", after / before, 1.05, unit=""),
    ]


def _cost(options: Options) -> tuple[list[CostResult], list[Row]]:
    model_dir = default_model_dir()
    shape = ("--prefill", "1", "--decode", "1", "--num-threads", "1")
    flags = (*_HANDOFFS, *shape, "--no-enable-prefix-caching")
    bare = (sys.executable, "-m", "kvferry.benchmarks.faults.bare", "serve")
    with ExitStack() as stack:
        safe_system = stack.enter_context(serving("safe", model_dir, flags, options.log_dir))
        bare_flags = (*flags, "--kv-checksum", "off")
        bare_system = stack.enter_context(serving("bare", model_dir, bare_flags, options.log_dir, program=bare))
        results = [
            asyncio.run(
                measure_cost(
                    safe_system, bare_system, input_len=input_len, num_pairs=options.num_pairs, seed=options.seed
                )
            )
            for input_len in options.cost_lens
        ]
    rows = []
    for result in results:
        for what, ratio in (("TTFT", result.ttft_ratio), ("TPOT", result.tpot_ratio)):
            rows.append(Row("cost", f"{what}, {result.input_len} tokens", ratio, 1.02, unit="", count=result.num_pairs))
    return results, rows


_MEASURE: dict[str, Callable[[Options], tuple[object, list[Row]]]] = {
    "aborts": _aborts,
    "gap": _gap,
    "overload": _overload,
    "cost": _cost,
}


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "none"
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def show(rows: list[Row]) -> Table:
    table = Table("part", "figure", "value", "bar", "n", "")
    for row in rows:
        value = _shown(row.value, row.unit)
        bar = f"{'>=' if row.at_least else '<='} {row.bar:g} {row.unit}"
        table.add_row(row.part, row.what, value, bar, str(row.count or ""), "met" if row.is_met else "MISSED")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvferry.benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--aborts", type=int, default=10_000)
    parser.add_argument("--timed-aborts", type=int, default=200)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--hangs", type=int, default=5)
    parser.add_argument("--overload-s", type=float, default=60.0)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--cost-lens", default=_COST_LENS, help="prompt lengths (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", type=Path)
    parser.add_argument("--json", type=Path, default=RESULTS_DIR / "faults.json")
    args = parser.parse_args()
    console = report_console()
    with tempfile.TemporaryDirectory() as folder:
        options = Options(
            args.aborts, args.timed_aborts, args.kills, args.hangs, args.overload_s, args.pairs,
            tuple(map(int, args.cost_lens.split(","))), args.seed,
            args.log_dir or Path(folder),
        )  # fmt: skip
        rows: list[Row] = []
        figures: dict[str, object] = {}
        for part in args.parts.split(","):
            if part not in _MEASURE:
                raise ConfigError(f"--parts: {part!r} is not one of {', '.join(PARTS)}")
            result, part_rows = _MEASURE[part](options)
            figures[part] = [asdict(one) for one in result] if isinstance(result, list) else asdict(result)  # type: ignore[call-overload]
            rows += part_rows
            console.print(show(part_rows))
    environment = describe_environment("python -m kvferry.benchmarks.faults", sys.argv[1:])
    save_json({"environment": asdict(environment), "rows": [asdict(row) for row in rows], **figures}, args.json)
    return 0 if all(row.is_met for row in rows) else 1
