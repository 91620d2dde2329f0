"""What exact results cost: the same steps with --deterministic and without, in turns.

    python -m kvferry.benchmarks.deterministic                                    # the built-in model, one thread
    python -m kvferry.benchmarks.deterministic --dtype float32                    # in torch instead of native code
    python -m kvferry.benchmarks.deterministic --decode 8@128 --prefill 512 --rounds 20

Two engines in one process, with equal weights, run every decode step and every prompt one after the other, the first
one in turn the second; a ratio is the median over these pairs. Keys and values of a context are random numbers. Then
both compute one prompt whole and in chunks: how many of its log-probabilities are other numbers, and by how much at
most. With --deterministic that must be none: else the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kvferry.benchmarks.engine.cases import decode_cases, prefill_cases
from kvferry.benchmarks.shared.plain_steps import decoding, feed, num_blocks_of, prefilling, sequence, timed
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.common.config import EngineConfig
from kvferry.models.default import default_model_dir
from kvferry.tools.load.arguments import output_file, positive_int
from kvferry.tools.load.environment import Environment, describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import milliseconds, report_console

if TYPE_CHECKING:
    from kvferry.engine.engine import Engine

# torch is imported inside functions: its threads are settled before.

_CUT_TOKENS = 600
_CUTS = (600, 256, 100, 1)  # tokens of a chunk; the first is the whole prompt
_KV_SEED = 1


@dataclass(slots=True, frozen=True)
class Cost:
    name: str
    off_ms: float  # medians
    on_ms: float
    ratio: float  # median over the pairs
    num_pairs: int


@dataclass(slots=True, frozen=True)
class Moved:
    """Log-probabilities of one prompt that change with its chunks, of all that were compared."""

    deterministic: bool
    num_moved: int
    num_compared: int
    largest: float


@dataclass(slots=True, frozen=True)
class Report:
    model: str
    kernels: str  # what computes in deterministic mode
    num_threads: int
    costs: tuple[Cost, ...]
    moved: tuple[Moved, Moved]  # off, on
    environment: Environment


@benchmark("deterministic")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(flags.threads)  # as the launcher does for a worker
    console = Console(stderr=True)
    report = _measure(flags, argv, console)
    _print(report, report_console())
    save_json(asdict(report), flags.json)
    console.print(f"written: {flags.json}", style="dim")
    return 1 if report.moved[1].num_moved else 0


def _measure(flags: argparse.Namespace, argv: list[str], console: Console) -> Report:
    model_dir: Path = flags.model or default_model_dir()
    rows = [*flags.decode, *((1, tokens) for tokens in (*flags.prefill, _CUT_TOKENS))]
    engines = tuple(_engine(flags, model_dir, rows, deterministic=on) for on in (False, True))
    costs = []
    for num_rows, context in flags.decode:
        console.print(f"decode {num_rows}@{context}", style="dim")
        steps = [decoding(engine, num_rows, context) for engine in engines]
        costs.append(_in_turns(f"decode {num_rows}@{context}", steps[0], steps[1], flags.rounds))
    for tokens in flags.prefill:
        console.print(f"prefill {tokens}", style="dim")
        prompts = [prefilling(engine, tokens) for engine in engines]
        costs.append(_in_turns(f"prefill {tokens}", prompts[0], prompts[1], flags.prompt_rounds))
    console.print("one prompt in chunks", style="dim")
    return Report(
        model=model_dir.name,
        kernels=engines[1].spec.results,
        num_threads=flags.threads,
        costs=tuple(costs),
        moved=(_moved(engines[0]), _moved(engines[1])),
        environment=describe_environment("python -m kvferry.benchmarks.deterministic", argv),
    )


def _engine(flags: argparse.Namespace, model_dir: Path, rows: list[tuple[int, int]], *, deterministic: bool) -> Engine:
    import torch

    from kvferry.engine.engine import Engine

    config = EngineConfig(
        model_dir=model_dir,
        served_model_name=model_dir.name,
        dtype=flags.dtype,
        device="cpu",
        num_threads=flags.threads,
        deterministic=deterministic,
    )
    engine = Engine(config, num_blocks=num_blocks_of(rows, config.block_tokens))
    engine.kv_pages.normal_(generator=torch.Generator().manual_seed(_KV_SEED))
    return engine


# --- times ----------------------------------------------------------------------------------------------------


def _in_turns(name: str, off: Callable[[], None], on: Callable[[], None], rounds: int) -> Cost:
    for run in (off, on):
        run()  # warm
    timed_off, timed_on = timed(off), timed(on)
    pairs: list[tuple[float, float]] = []
    for number in range(rounds):
        if number % 2:
            second, first = timed_on(), timed_off()
        else:
            first, second = timed_off(), timed_on()
        pairs.append((first, second))
    off_s, on_s = (median(pair[side] for pair in pairs) for side in (0, 1))
    return Cost(name, off_s * 1e3, on_s * 1e3, median(second / first for first, second in pairs), rounds)


# --- bits -----------------------------------------------------------------------------------------------------


def _moved(engine: Engine) -> Moved:
    whole, *others = (feed(engine, sequence(engine, 0, _CUT_TOKENS, prompt_logprobs=0), chunk) for chunk in _CUTS)
    differences = [
        abs(one.logprob - other.logprob)
        for cut in others
        for one, other in zip(whole, cut, strict=True)
        if one.logprob is not None and other.logprob is not None
    ]
    moved = [difference for difference in differences if difference > 0]
    return Moved(engine.config.deterministic, len(moved), len(differences), max(moved, default=0.0))


# --- showing --------------------------------------------------------------------------------------------------


def _print(report: Report, console: Console) -> None:
    table = Table(title=f"{report.model}, {report.num_threads} thread(s), {report.kernels}", title_justify="left")
    table.add_column("case")
    for column in ("off ms", "on ms", "ratio", "pairs"):
        table.add_column(column, justify="right")
    for cost in report.costs:
        figures = (milliseconds(cost.off_ms), milliseconds(cost.on_ms), f"{cost.ratio:.3f}", str(cost.num_pairs))
        table.add_row(cost.name, *figures)
    console.print(table)
    for moved in report.moved:
        mode = "on" if moved.deterministic else "off"
        console.print(
            f"{mode}: {moved.num_moved} of {moved.num_compared} log-probabilities move with a prompt's chunks, "
            f"by {moved.largest:.2g} at most"
        )


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("deterministic", __doc__)
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="Hugging Face directory (default: built-in model)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="(default: %(default)s)")
    add("--threads", type=positive_int, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    add(
        "--decode",
        type=decode_cases,
        default=decode_cases("1@128,8@128,32@128,1@2048,8@2048,32@2048"),
        metavar="ROWS@TOKENS,…",
        help="(default: 1, 8 and 32 rows at 128 and 2048)",
    )
    add("--prefill", type=prefill_cases, default=(2048,), metavar="TOKENS,…", help="(default: 2048)")
    add("--rounds", type=positive_int, default=40, help="pairs of steps of a decode case (default: %(default)s)")
    add("--prompt-rounds", type=positive_int, default=5, metavar="N", help="pairs of prompts (default: %(default)s)")
    add(
        "--json",
        type=output_file,
        default=RESULTS_DIR / "deterministic.json",
        metavar="FILE",
        help="(default: %(default)s)",
    )
    return parser
