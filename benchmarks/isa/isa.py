"""How fast the C++ of each instruction set is, beside torch held to AVX2: the same steps and prompts in turns.

    python -m kvferry.benchmarks.isa                                              # the built-in model, one thread
    python -m kvferry.benchmarks.isa --decode 8@2048 --prefill 2048 --rounds 20

One engine for each set that the processor has, and one in torch, in one process with equal weights. Every round runs a
case on each, in an order that turns; what counts is the least CPU time of the rounds, as other programs run beside it.
With --check the exit code is 1 where AVX2 is not at least twice as fast as torch.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.console import Console
from rich.table import Table

from kvferry.benchmarks.engine.cases import check_cases, decode_cases, prefill_cases
from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.plain_steps import cpu_timed, decoding, least_ms, num_blocks_of, prefilling
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.common.config import CpuIsa, EngineConfig
from kvferry.models.default import default_model_dir
from kvferry.tools.load.arguments import output_file, positive_int
from kvferry.tools.load.environment import Environment, describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import milliseconds, report_console

if TYPE_CHECKING:
    from kvferry.engine.engine import Engine

# torch is imported inside functions: its threads and its instruction set are settled before.

_TORCH = "torch, AVX2"
_HELD = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
_MIN_SPEEDUP = 2.0  # of AVX2 over torch, in every case
_KV_SEED = 1


@dataclass(slots=True, frozen=True)
class Case:
    name: str
    ms: dict[str, float]  # least CPU time of each engine
    num_rounds: int

    @property
    def speedup(self) -> float | None:
        """Return how many times as long torch takes as the C++ for AVX2; None on a processor that has no AVX2."""
        return self.ms[_TORCH] / self.ms["avx2"] if "avx2" in self.ms else None

    @property
    def bar(self) -> Bar:
        return Bar(f"{self.name}: torch / avx2", self.speedup, _MIN_SPEEDUP, at_least=True, count=self.num_rounds)


@dataclass(slots=True, frozen=True)
class Report:
    model: str
    num_threads: int
    cases: tuple[Case, ...]
    environment: Environment

    @property
    def bars(self) -> list[Bar]:
        return [case.bar for case in self.cases]


@benchmark("isa")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    os.environ |= _HELD | {"OMP_NUM_THREADS": str(flags.threads)}
    console = Console(stderr=True)
    check_cases(flags.decode, flags.prefill)
    model_dir: Path = flags.model or default_model_dir()
    engines = dict(_engines(flags, model_dir))
    report = Report(
        model=model_dir.name,
        num_threads=flags.threads,
        cases=tuple(_measure(flags, engines, console)),
        environment=describe_environment("python -m kvferry.benchmarks.isa", argv),
    )
    _print(report, report_console())
    save_json(asdict(report) | {"bars": [bar.as_json() for bar in report.bars]}, flags.json)
    console.print(f"written: {flags.json}", style="dim")
    return exit_code(report.bars) if flags.check else 0


def _engines(flags: argparse.Namespace, model_dir: Path) -> Iterator[tuple[str, Engine]]:
    import torch

    from kvferry.engine.cpu.build import usable_sets
    from kvferry.engine.engine import Engine

    sets = usable_sets()
    names: dict[str, CpuIsa] = {name: name for name in get_args(CpuIsa) if name in sets}
    for name, isa in [*names.items(), (_TORCH, "auto")]:
        config = EngineConfig(
            model_dir=model_dir,
            served_model_name=model_dir.name,
            dtype="bfloat16",
            device="cpu",
            num_threads=flags.threads,
            cpu_isa=isa,
        )
        rows = [*flags.decode, *((1, tokens) for tokens in flags.prefill)]
        engine = Engine(config, num_blocks=num_blocks_of(rows, config.block_tokens), native=name != _TORCH)
        engine.kv_pages.normal_(generator=torch.Generator().manual_seed(_KV_SEED))
        yield name, engine


def _measure(flags: argparse.Namespace, engines: dict[str, Engine], console: Console) -> Iterator[Case]:
    for num_rows, context in flags.decode:
        console.print(case := f"decode {num_rows}@{context}", style="dim")
        runs = {name: cpu_timed(decoding(engine, num_rows, context)) for name, engine in engines.items()}
        yield Case(case, least_ms(runs, flags.rounds), flags.rounds)
    for tokens in flags.prefill:
        console.print(case := f"prefill {tokens}", style="dim")
        runs = {name: cpu_timed(prefilling(engine, tokens)) for name, engine in engines.items()}
        yield Case(case, least_ms(runs, flags.prompt_rounds), flags.prompt_rounds)


def _print(report: Report, console: Console) -> None:
    table = Table(title=f"{report.model}, {report.num_threads} thread(s), CPU ms", title_justify="left")
    table.add_column("case")
    for column in report.cases[0].ms:
        table.add_column(column, justify="right")
    for case in report.cases:
        table.add_row(case.name, *map(milliseconds, case.ms.values()))
    console.print(table)
    console.print(bar_table("AVX2 beside torch", report.bars))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("isa", __doc__)
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="Hugging Face directory (default: built-in model)")
    add("--threads", type=positive_int, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    add("--decode", type=decode_cases, default=decode_cases("1@128,8@128,8@1024"), metavar="ROWS@TOKENS,…")
    add("--prefill", type=prefill_cases, default=(512, 2048), metavar="TOKENS,…")
    add("--rounds", type=positive_int, default=20, help="of a decode case (default: %(default)s)")
    add("--prompt-rounds", type=positive_int, default=3, metavar="N", help="of a prompt (default: %(default)s)")
    add("--check", action="store_true", help="exit with 1 where AVX2 is not twice as fast as torch")
    add("--json", type=output_file, default=RESULTS_DIR / "isa.json", metavar="FILE", help="(default: %(default)s)")
    return parser
