"""The figures of the serving measurement: kept in a JSON file, compared with the peer's, shown as tables.

A row is one system in one cell with all its runs, and with the commit and the command that they were measured with.
The file grows row by row: an interrupted measurement keeps what it has, and a later one replaces its own rows alone.
A figure of a row is the median over its runs. A bar is met by a row whose every request was answered in full, against
a peer of which the same holds; where the peer failed there is nothing to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import msgspec
from rich.console import Console
from rich.table import Table

from kvferry.benchmarks.serve.client import Cell, ClientRun
from kvferry.benchmarks.serve.terms import Terms
from kvferry.common.errors import ConfigError
from kvferry.tools.load.environment import Environment
from kvferry.tools.load.json_file import save_json

Figure = Literal["median_ttft_ms", "median_tpot_ms", "p99_itl_ms", "output_tokens_per_s"]
Verdict = Literal["met", "missed", "not compared", ""]  # "": the figure has no bar

FIGURES: dict[Figure, str] = {
    "median_ttft_ms": "TTFT ms",
    "median_tpot_ms": "TPOT ms",
    "p99_itl_ms": "ITL p99 ms",
    "output_tokens_per_s": "tokens/s",
}
TABLE_WIDTH = 144
ORDER = ("kvferry-co", "vllm-agg", "kvferry-pd", "vllm-pd", "vllm-pd-shared")  # each before its peers
# System and peer -> the most that its TTFT and TPOT may be of the peer's.
BARS = {
    ("kvferry-co", "vllm-agg"): 0.9,
    ("kvferry-pd", "vllm-pd"): 0.8,
    ("kvferry-pd", "vllm-pd-shared"): 0.8,
}
# The least that the throughput may be of the peer's, where so many requests are in flight.
THROUGHPUT_BARS = {("kvferry-co", "vllm-agg"): 1.1}
THROUGHPUT_CONCURRENCY = 8
DISTURBED_CORES = 0.1


@dataclass(slots=True, frozen=True)
class Spread:
    """Over the runs of a row."""

    median: float
    min: float
    max: float


@dataclass(slots=True, frozen=True)
class Row:
    """One system in one cell."""

    system: str
    cell: Cell
    about: str  # version and settings that matter
    environment: Environment
    runs: tuple[ClientRun, ...]

    @property
    def key(self) -> tuple[str, str]:
        return self.system, str(self.cell)

    @property
    def num_failed(self) -> int:
        return sum(run.num_failed for run in self.runs)

    @property
    def is_clean(self) -> bool:
        return all(run.is_clean for run in self.runs)

    @property
    def problems(self) -> list[str]:
        return sorted({problem for run in self.runs for problem in run.problems})

    @property
    def foreign_cores(self) -> float:
        """Of the worst run."""
        return max((run.cores.foreign for run in self.runs if run.cores), default=0.0)

    def spread(self, figure: Figure) -> Spread | None:
        values = [value for run in self.runs if (value := getattr(run, figure)) is not None]
        return Spread(median(values), min(values), max(values)) if values else None


@dataclass(slots=True, frozen=True)
class ServeReport:
    terms: Terms
    rows: tuple[Row, ...] = ()

    def with_row(self, row: Row) -> ServeReport:
        """In the place of an older row of the same system and cell."""
        kept = [old for old in self.rows if old.key != row.key]
        return replace(self, rows=tuple(sorted([*kept, row], key=_row_order)))

    def find(self, system: str, cell: Cell) -> Row | None:
        return next((row for row in self.rows if row.key == (system, str(cell))), None)


def _row_order(row: Row) -> tuple[int, int, int, int, int]:
    cell = row.cell
    rank = ORDER.index(row.system) if row.system in ORDER else len(ORDER)
    return cell.input_len, cell.output_len, cell.concurrency, cell.num_requests, rank


@dataclass(slots=True, frozen=True)
class Ratio:
    """A figure of a system over that of its peer."""

    value: float | None  # None: one of the two has no figure
    bar: float | None
    verdict: Verdict

    def __str__(self) -> str:
        value = "-" if self.value is None else f"{self.value:.2f}"
        return f"{value} {self.verdict}".strip()


@dataclass(slots=True, frozen=True)
class Comparison:
    """One system against one peer in one cell."""

    cell: Cell
    system: str
    peer: str
    ratios: dict[Figure, Ratio]


def compare(report: ServeReport) -> list[Comparison]:
    """Every pair of `BARS` in every cell in which both were measured."""
    found = []
    for row in report.rows:
        for system, peer in BARS:
            other = report.find(peer, row.cell) if system == row.system else None
            if other is not None:
                ratios = {figure: _ratio(row, other, figure) for figure in FIGURES}
                found.append(Comparison(row.cell, system, peer, ratios))
    return found


def _ratio(row: Row, peer: Row, figure: Figure) -> Ratio:
    ours, theirs = row.spread(figure), peer.spread(figure)
    value = ours.median / theirs.median if ours and theirs and theirs.median else None
    bar = bar_of(row.system, peer.system, row.cell, figure)
    return Ratio(value, bar, _verdict(row, peer, value, bar, is_more_better=figure == "output_tokens_per_s"))


def _verdict(row: Row, peer: Row, value: float | None, bar: float | None, *, is_more_better: bool) -> Verdict:
    if bar is None:
        return ""
    if not row.is_clean:
        return "missed"
    if not peer.is_clean or value is None:
        return "not compared"
    return "met" if (value >= bar if is_more_better else value <= bar) else "missed"


def bar_of(system: str, peer: str, cell: Cell, figure: Figure) -> float | None:
    if figure in ("median_ttft_ms", "median_tpot_ms"):
        return BARS[system, peer]
    if figure == "output_tokens_per_s" and cell.concurrency >= THROUGHPUT_CONCURRENCY:
        return THROUGHPUT_BARS.get((system, peer))
    return None


def load_report(path: Path, terms: Terms) -> ServeReport:
    """The rows measured so far. Raises ConfigError if they were measured on other terms."""
    if not path.exists():
        return ServeReport(terms)
    report = read_report(path)
    if report.terms != terms:
        raise ConfigError(
            f"{path} holds figures of {report.terms}, and this is {terms}: give another --json, or --fresh"
        )
    return report


def read_report(path: Path) -> ServeReport:
    try:
        report = msgspec.json.decode(path.read_bytes(), type=ServeReport)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return replace(report, terms=report.terms.completed([row.environment for row in report.rows]))


def write_report(report: ServeReport, path: Path) -> None:
    save_json(asdict(report), path)


def print_serve(report: ServeReport, console: Console) -> None:
    terms = report.terms
    console.print(
        f"{terms.model} on {terms.num_cores} cores ({terms.cpu}), measured with {terms.client} in closed loop; "
        "median over the runs, and their range",
        highlight=False,
    )
    console.print(_figure_table(report.rows))
    for row in report.rows:
        for problem in row.problems:
            console.print(f"{row.system} {row.cell}: {problem}", style="red", markup=False, highlight=False)
    disturbed = [f"{row.system} {row.cell}" for row in report.rows if row.foreign_cores > DISTURBED_CORES]
    if disturbed:
        told = f"other programs used more than {DISTURBED_CORES:g} cores during a run of: {', '.join(disturbed)}"
        console.print(told, style="yellow", highlight=False)
    comparisons = compare(report)
    if comparisons:
        console.print(_ratio_table(comparisons))
        console.print(_bar_line(comparisons), highlight=False)


def _figure_table(rows: Sequence[Row]) -> Table:
    table = Table(title="input/output/in flight", title_justify="left")
    table.add_column("cell")
    table.add_column("system")
    for column in (*FIGURES.values(), "runs", "failed", "foreign"):
        table.add_column(column, justify="right")
    for index, row in enumerate(rows):
        is_first = index == 0 or str(rows[index - 1].cell) != str(row.cell)
        figures = [spread_text(row.spread(figure)) for figure in FIGURES]
        failed = str(row.num_failed) if row.is_clean else f"[red]{row.num_failed or 'see below'}[/red]"
        counts = [str(len(row.runs)), failed, f"{row.foreign_cores:.2f}"]
        is_last = index + 1 == len(rows) or str(rows[index + 1].cell) != str(row.cell)
        table.add_row(str(row.cell) if is_first else "", row.system, *figures, *counts, end_section=is_last)
    return table


def spread_text(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    middle, low, high = (_three_digits(value) for value in (spread.median, spread.min, spread.max))
    return middle if low == high else f"{middle} ({low}-{high})"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio_table(comparisons: Sequence[Comparison]) -> Table:
    table = Table(title="ratios to the peer, and whether they meet their bars", title_justify="left")
    for column in ("cell", "system", "peer"):
        table.add_column(column)
    for label in FIGURES.values():
        table.add_column(label.removesuffix(" ms"), justify="right")
    for comparison in comparisons:
        ratios = [_coloured(ratio) for ratio in comparison.ratios.values()]
        table.add_row(str(comparison.cell), comparison.system, comparison.peer, *ratios)
    return table


def _coloured(ratio: Ratio) -> str:
    colour = {"met": "green", "missed": "red", "not compared": "yellow", "": ""}[ratio.verdict]
    return f"[{colour}]{ratio}[/{colour}]" if colour else str(ratio)


def _bar_line(comparisons: Sequence[Comparison]) -> str:
    verdicts = [ratio.verdict for comparison in comparisons for ratio in comparison.ratios.values()]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("met", "missed", "not compared"))
    compared = {(comparison.system, comparison.peer) for comparison in comparisons}
    rules = [
        f"{system} TTFT and TPOT <= {bar:g} of {peer}"
        for (system, peer), bar in BARS.items()
        if (system, peer) in compared
    ]
    rules += [
        f"{system} tokens/s >= {bar:g} of {peer} with {THROUGHPUT_CONCURRENCY} or more in flight"
        for (system, peer), bar in THROUGHPUT_BARS.items()
        if (system, peer) in compared
    ]
    return f"bars: {counts} ({'; '.join(rules)})"
