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

import asyncio
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from kvferry.benchmarks.engine.cases import prefill_cases
from kvferry.benchmarks.faults.aborts import AbortResult, measure_aborts
from kvferry.benchmarks.faults.cost import CostResult, measure_cost
from kvferry.benchmarks.faults.gap import GapResult, measure_gaps
from kvferry.benchmarks.faults.overload import TTFT_OBJECTIVE_MS, OverloadResult, measure_overload
from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, names_of, parser_of
from kvferry.models.default import default_model_dir
from kvferry.tools.chaos.serve_system import System, serving
from kvferry.tools.load.arguments import output_file, positive_float, positive_int
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import report_console
from kvferry.tools.load.tiny_model import write_tiny_model

_COST_LENS = (128, 512, 2048)
_HANDOFFS = ("--policy", "least_loaded")  # every prompt is handed over


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


def _aborts(options: Options) -> tuple[AbortResult, list[Bar]]:
    with _tiny("aborts", options, *_HANDOFFS, "--prefill", "1", "--decode", "1", "--max-num-seqs", "32") as system:
        result = asyncio.run(
            measure_aborts(system, num_aborts=options.num_aborts, num_timed=options.num_timed, seed=options.seed)
        )
    after_ms = None if result.free_after_s is None else result.free_after_s * 1e3
    release_ms = result.release_ms
    return result, [
        Bar("aborts: all blocks free after the last abort", after_ms, 1000, unit="ms", count=result.num_aborts),
        Bar("aborts: release after a disconnect, p99", release_ms.p99, 250, unit="ms", count=release_ms.count),
    ]


def _gap(options: Options) -> tuple[GapResult, list[Bar]]:
    with _tiny("gap", options, *_HANDOFFS, "--prefill", "2", "--decode", "2") as system:
        result = asyncio.run(
            measure_gaps(system, num_kills=options.num_kills, num_hangs=options.num_hangs, seed=options.seed)
        )
    recompute_ms, num_gaps = result.recompute_ms.p99 or 0.0, result.gap_ms.count
    return result, [
        Bar("gap: streams that broke", result.num_broken, 0, count=result.num_kills),
        Bar("gap: pause at the death of the decode worker, p50", result.gap_ms.p50, 400, unit="ms", count=num_gaps),
        Bar("gap: the same, p99", result.gap_ms.p99, 1000 + recompute_ms, unit="ms", count=num_gaps),
        *(
            Bar(f"gap: {what}, max", seen.max, limit, unit="ms", count=seen.count)
            for what, seen, limit in (
                ("death noticed", result.death_ms, 300),
                ("hang noticed", result.hang_ms, 3500),
                ("other side of a failed transfer knows", result.transfer_ms, 100),
            )
        ),
    ]


def _overload(options: Options) -> tuple[OverloadResult, list[Bar]]:
    objective = ("--ttft-objective-ms", str(TTFT_OBJECTIVE_MS))
    flags = ("--prefill", "1", "--decode", "1", "--no-enable-prefix-caching", *objective)
    with serving("overload", default_model_dir(), flags, options.log_dir) as system:
        result = asyncio.run(measure_overload(system, duration_s=options.overload_s, seed=options.seed))
    single, over = result.single, result.overload
    (before, after), num_admitted = result.memory_mib, over.ttft_ms.count
    return result, [
        Bar("overload: goodput at 5x / at 1x", _ratio(over.goodput_per_s, single.goodput_per_s), 0.95, at_least=True),
        Bar("overload: refusal, p99", over.refusal_ms.p99, 20, unit="ms", count=over.refusal_ms.count),
        Bar("overload: TTFT of admitted, p99", over.ttft_ms.p99, TTFT_OBJECTIVE_MS, unit="ms", count=num_admitted),
        Bar("overload: requests neither answered nor refused", over.num_failed, 0, count=over.num_sent),
        Bar("overload: memory after / before", after / before, 1.05),
    ]


def _ratio(value: float, other: float) -> float | None:
    return value / other if other else None


def _cost(options: Options) -> tuple[list[CostResult], list[Bar]]:
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
    return results, [
        Bar(f"cost: {what}, {result.input_len} tokens", ratio, 1.02, count=result.num_pairs)
        for result in results
        for what, ratio in (("TTFT", result.ttft_ratio), ("TPOT", result.tpot_ratio))
    ]


PARTS: dict[str, Callable[[Options], tuple[object, list[Bar]]]] = {
    "aborts": _aborts,
    "gap": _gap,
    "overload": _overload,
    "cost": _cost,
}


@benchmark("faults")
def main(argv: list[str]) -> int:
    parser = parser_of("faults", __doc__)
    parts = f"with commas (default: {','.join(PARTS)})"
    parser.add_argument("--parts", type=names_of(PARTS), default=tuple(PARTS), metavar="NAMES", help=parts)
    parser.add_argument("--aborts", type=positive_int, default=10_000)
    parser.add_argument("--timed-aborts", type=positive_int, default=200)
    parser.add_argument("--kills", type=positive_int, default=40)
    parser.add_argument("--hangs", type=positive_int, default=5)
    parser.add_argument("--overload-s", type=positive_float, default=60.0)
    parser.add_argument("--pairs", type=positive_int, default=40)
    lens = "prompt lengths (default: 128,512,2048)"
    parser.add_argument("--cost-lens", type=prefill_cases, default=_COST_LENS, help=lens)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", type=Path)
    parser.add_argument("--json", type=output_file, default=RESULTS_DIR / "faults.json")
    args = parser.parse_args(argv)
    console = report_console()
    with tempfile.TemporaryDirectory() as folder:
        options = Options(
            args.aborts, args.timed_aborts, args.kills, args.hangs, args.overload_s, args.pairs,
            args.cost_lens, args.seed,
            args.log_dir or Path(folder),
        )  # fmt: skip
        bars: list[Bar] = []
        figures: dict[str, object] = {}
        for part in args.parts:
            result, own = PARTS[part](options)
            figures[part] = [asdict(one) for one in result] if isinstance(result, list) else asdict(result)  # type: ignore[call-overload]
            bars += own
            console.print(bar_table(part, own))
    environment = describe_environment("python -m kvferry.benchmarks.faults", argv)
    save_json({"environment": asdict(environment), "bars": [bar.as_json() for bar in bars], **figures}, args.json)
    return exit_code(bars)
