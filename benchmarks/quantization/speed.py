"""What quantized weights save in time: the same steps and prompts by one model in several forms, in turns.

    python -m kvferry.benchmarks.quantization.speed                         # the built-in model, one thread, C++
    python -m kvferry.benchmarks.quantization.speed --cpu-isa avx2 --kinds plain,int8

One engine for each form, in one process. What counts is the least CPU time of the rounds, as other programs run beside.
With --check the exit code is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from kvferry.benchmarks.engine.cases import check_cases, decode_cases, prefill_cases
from kvferry.benchmarks.quantization.quantization import KINDS, config_of
from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.plain_steps import cpu_timed, decoding, least_ms, num_blocks_of, prefilling
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, names_of, parser_of
from kvferry.tools.load.arguments import output_file, positive_int
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import milliseconds, report_console

if TYPE_CHECKING:
    from kvferry.engine.engine import Engine

# torch is imported inside functions: its threads are settled before.

_DECODE_BARS = {"int8": 0.6, "int4": 0.45}  # of a lone answer's step, times the plain form's
_PREFILL_BAR = 1.0


@dataclass(slots=True, frozen=True)
class Case:
    name: str
    ms: dict[str, float]  # least CPU time of each form
    num_rounds: int

    def bars(self) -> list[Bar]:
        found = []
        for kind, limit in _DECODE_BARS.items():
            if {"plain", kind} <= self.ms.keys():
                bar = _PREFILL_BAR if self.name.startswith("prefill") else limit if " 1@" in self.name else None
                found.append(Bar(f"{kind}, {self.name}", self.ms[kind] / self.ms["plain"], bar, count=self.num_rounds))
        return found


@benchmark("quantization.speed")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(flags.threads)
    console = report_console()
    check_cases(flags.decode, flags.prefill)
    engines = {kind: _engine(flags, kind) for kind in flags.kinds}
    cases = []
    for rows, context in flags.decode:
        runs = {kind: cpu_timed(decoding(engine, rows, context)) for kind, engine in engines.items()}
        cases.append(Case(f"decode {rows}@{context}", least_ms(runs, flags.rounds), flags.rounds))
    for tokens in flags.prefill:
        runs = {kind: cpu_timed(prefilling(engine, tokens)) for kind, engine in engines.items()}
        cases.append(Case(f"prefill {tokens}", least_ms(runs, flags.prompt_rounds), flags.prompt_rounds))
    table = Table(title=f"built-in model, {flags.threads} thread(s), CPU ms", title_justify="left")
    for column in ("case", *flags.kinds):
        table.add_column(column, justify="left" if column == "case" else "right")
    for case in cases:
        table.add_row(case.name, *map(milliseconds, case.ms.values()))
    console.print(table)
    bars = [bar for case in cases for bar in case.bars()]
    console.print(bar_table("of the plain form's time", bars))
    environment = describe_environment("python -m kvferry.benchmarks.quantization.speed", argv)
    body: dict[str, object] = {"cases": [asdict(case) for case in cases], "bars": [bar.as_json() for bar in bars]}
    save_json({**body, "environment": asdict(environment)}, flags.json)
    return exit_code(bars) if flags.check else 0


def _engine(flags: argparse.Namespace, kind: str) -> Engine:
    from kvferry.engine.engine import Engine

    config = config_of(kind, None, dtype="bfloat16", threads=flags.threads, cpu_isa=flags.cpu_isa)
    sizes = [*flags.decode, *((1, tokens) for tokens in flags.prefill)]
    return Engine(config, num_blocks=num_blocks_of(sizes, config.block_tokens))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("quantization.speed", __doc__)
    add = parser.add_argument
    add("--kinds", type=names_of(KINDS), default=KINDS, metavar="KIND,…", help=f"of {', '.join(KINDS)} (default: all)")
    add("--threads", type=positive_int, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    add("--cpu-isa", default="auto", help="the instruction set (default: %(default)s)")
    add("--decode", type=decode_cases, default=decode_cases("1@160,8@160"), metavar="ROWS@TOKENS,…")
    add("--prefill", type=prefill_cases, default=(128, 512, 2048), metavar="TOKENS,…")
    add("--rounds", type=positive_int, default=40, metavar="N", help="of a decode case (default: %(default)s)")
    add("--prompt-rounds", type=positive_int, default=5, metavar="N", help="of a prompt (default: %(default)s)")
    add("--check", action="store_true", help="exit with 1 where a bar is missed")
    file = RESULTS_DIR / "quantization-speed.json"
    add("--json", type=output_file, default=file, metavar="FILE", help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
