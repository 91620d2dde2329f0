"""Structured output: do finished answers validate, what is refused, and what does it cost?

    python -m kvferry.benchmarks.grammar                                  # the built-in model, served here
    python -m kvferry.benchmarks.grammar --suite 40 --generated 20 --pairs 10
    python -m kvferry.benchmarks.grammar --url http://127.0.0.1:8000/v1 --served-model NAME

Every schema of the JSON Schema Test Suite (2020-12, the required ones) and generated ones are asked with at temperature
1. Answers that end with `stop` are checked with the `jsonschema` library; what is cut by `max_tokens` is counted; what
is refused is counted by the keyword that its error names. Then one stream at a time, in turns: an answer that follows
a schema nobody has seen before, one to the same prompt that follows none. Times are pairs on one server, so what else
the machine does meets both. The exit code is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import httpx
from rich.console import Console
from rich.table import Table

from kvferry.benchmarks.grammar.asking import Asked, Pair, ask_all, ask_pairs
from kvferry.benchmarks.grammar.schemas import Case, generated, suite
from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.common.errors import ConfigError
from kvferry.models.default import cache_dir
from kvferry.tools.load.arguments import natural, output_file, positive_int
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import report_console
from kvferry.tools.load.server_process import free_port, running
from kvferry.tools.load.stats import percentile

_START_LIMIT_S = 300.0


@dataclass(slots=True, frozen=True)
class Report:
    asked: list[Asked]
    pairs: list[Pair]

    def bars(self) -> list[Bar]:
        invalid = [not one.is_valid for one in self.asked if one.finish == "stop"]
        strange = [one.status not in (200, 400) for one in self.asked]
        of_generated = self._refused("generated")
        return [
            Bar("finished answers that do not validate", _count(invalid), 0, count=len(invalid)),
            Bar("neither answered nor refused", _count(strange), 0, count=len(strange)),
            Bar("refused, generated", of_generated, None if of_generated is None else 10, unit="%"),
            Bar("refused, suite", self._refused("suite"), None, unit="%"),
            *(self._times() if self.pairs else ()),
        ]

    def _times(self) -> list[Bar]:
        pairs = self.pairs
        free_tpot, bound_tpot = ([pair.tpot_s(side) for pair in pairs] for side in (0, 1))
        free_gaps, bound_gaps = ([gap for pair in pairs for gap in pair.gaps_s[side]] for side in (0, 1))
        added_ms = [1e3 * (pair.ttft_s[1] - pair.ttft_s[0]) for pair in pairs]
        return [
            Bar("TPOT p50, of unconstrained", _ratio(bound_tpot, free_tpot, 50), 1.03, count=len(pairs)),
            Bar("gap p99, of unconstrained", _ratio(bound_gaps, free_gaps, 99), 1.10, count=len(free_gaps)),
            Bar("TTFT more with a new schema, p50", median(added_ms), 5, unit="ms"),
        ]

    def _refused(self, source: str) -> float | None:
        refused = [one.status == 400 for one in self.asked if one.source == source]
        return 100 * sum(refused) / len(refused) if refused else None


def _count(found: Sequence[bool]) -> int | None:
    return sum(found) if found else None


def _ratio(ours: Sequence[float], theirs: Sequence[float], percent: float) -> float:
    return percentile(sorted(ours), percent) / percentile(sorted(theirs), percent)


@benchmark("grammar")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    console = Console(stderr=True)
    cases = [*suite(cache_dir() / "downloads")[: flags.suite], *generated(flags.generated, flags.seed)]
    if not cases:
        raise ConfigError("--suite 0 --generated 0: there is no schema to ask with")
    report = _run(flags, cases, console)
    statuses = Counter(one.status for one in report.asked)
    if not statuses.keys() & {200, 400}:
        raise ConfigError(f"no schema was answered or refused, by status: {dict(statuses)}")
    bars = report.bars()
    _print(report, bars, report_console())
    figures: dict[str, object] = {
        "bars": [bar.as_json() for bar in bars],
        "refused": dict(_reasons(report.asked)),
        "asked": [asdict(one) for one in report.asked],
        "pairs": [asdict(pair) for pair in report.pairs],
        "environment": asdict(describe_environment("python -m kvferry.benchmarks.grammar", argv)),
    }
    save_json(figures, flags.json)
    console.print(f"written: {flags.json}", style="dim")
    return exit_code(bars)


def _run(flags: argparse.Namespace, cases: list[Case], console: Console) -> Report:
    if flags.url is not None:
        try:
            return asyncio.run(_measure(flags, flags.url, cases, console))
        except httpx.ConnectError as error:
            raise ConfigError(f"--url {flags.url}: {error}") from error
    port = free_port()
    model = [str(flags.model)] if flags.model else []
    command = [sys.executable, "-m", "kvferry", "serve", *model, "--port", str(port), *flags.serve_flags.split()]
    command += ["--served-model-name", flags.served_model]
    with tempfile.TemporaryDirectory() as folder, running("kvferry", command, Path(folder)) as server:
        console.print("starting", style="dim")
        server.wait_until_healthy(f"http://127.0.0.1:{port}/ready", _START_LIMIT_S)
        return asyncio.run(_measure(flags, f"http://127.0.0.1:{port}/v1", cases, console))


async def _measure(flags: argparse.Namespace, url: str, cases: list[Case], console: Console) -> Report:
    console.print(f"{flags.pairs} pairs", style="dim")
    pairs = await ask_pairs(url, flags.served_model, flags.pairs)
    console.print(f"{len(cases)} schemas", style="dim")
    asked = await ask_all(
        url, flags.served_model, cases, max_tokens=flags.max_tokens, concurrency=flags.concurrency, seed=flags.seed
    )
    return Report(asked, pairs)


def _reasons(asked: Sequence[Asked]) -> Counter[str]:
    return Counter(f"{one.source}: {one.reason}" for one in asked if one.status == 400)


def _print(report: Report, bars: list[Bar], console: Console) -> None:
    table = Table(title="schemas", title_justify="left")
    for column in ("", "asked", "finished", "valid", "cut", "refused", "neither"):
        table.add_column(column, justify="right")
    for source in ("suite", "generated"):
        asked = [one for one in report.asked if one.source == source]
        ended = [one for one in asked if one.finish == "stop"]
        figures = [len(asked), len(ended), sum(one.is_valid for one in ended)]
        figures.append(sum(one.finish == "length" for one in asked))
        figures += [sum(one.status == 400 for one in asked), sum(one.status not in (200, 400) for one in asked)]
        table.add_row(source, *map(str, figures))
    console.print(table)
    for reason, count in _reasons(report.asked).most_common():
        console.print(f"{count:4d} refused, {reason}", markup=False)
    console.print(bar_table("structured output", bars))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("grammar", __doc__)
    add = parser.add_argument
    add("--url", metavar="URL", help="a server that runs (default: one is started)")
    add("--model", type=Path, metavar="DIR", help="Hugging Face directory (default: built-in model)")
    add("--served-model", default="model", metavar="NAME", help="(default: %(default)s)")
    add("--serve-flags", default="", metavar="FLAGS", help="for `kvferry serve`, in one word")
    add("--suite", type=natural, default=1000, metavar="N", help="schemas of the suite (default: all)")
    add("--generated", type=natural, default=200, metavar="N", help="generated schemas (default: %(default)s)")
    add("--pairs", type=natural, default=40, metavar="N", help="pairs of timed streams (default: %(default)s)")
    add("--max-tokens", type=positive_int, default=160, metavar="N", help="of an answer (default: %(default)s)")
    add("--concurrency", type=positive_int, default=8, metavar="N", help="answers at once (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    add("--json", type=output_file, default=RESULTS_DIR / "grammar.json", metavar="FILE", help="(default: %(default)s)")
    return parser
