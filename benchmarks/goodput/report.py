"""The goodput comparison as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rich.table import Table

from kvferry.benchmarks.goodput.search import Best, System
from kvferry.benchmarks.shared.bars import Bar, bar_table
from kvferry.tools.load.plot import COLOURS, new_figure, save_figure
from kvferry.tools.load.report import report_console

BAR = 1.15
LONG_CONTEXT = "mooncake-conversation"
LONG_CONTEXT_BAR = 2.0


class LevelRow(Protocol):
    @property
    def system(self) -> System: ...
    @property
    def rate_per_s(self) -> float: ...
    @property
    def attainment(self) -> float: ...


class TraceRows(Protocol):
    """What is shown of one trace."""

    @property
    def trace(self) -> str: ...
    @property
    def part(self) -> str: ...
    @property
    def ceiling_per_s(self) -> float: ...
    @property
    def best(self) -> Sequence[Best]: ...
    @property
    def levels(self) -> Sequence[LevelRow]: ...
    @property
    def ours(self) -> Best: ...
    @property
    def strongest(self) -> Best: ...
    @property
    def colocated(self) -> Best: ...


def print_goodput(results: Sequence[TraceRows]) -> None:
    console = report_console()
    for result in results:
        table = Table(title=f"{result.trace}, {result.part} part; oracle {result.ceiling_per_s:.2f} good requests/s")
        for column in (
            "system",
            "best split",
            "good requests/s",
            "of the oracle",
            "kvferry / it",
            "attainment at levels",
        ):
            table.add_column(column, justify="left" if column in ("system", "best split") else "right")
        for best in result.best:
            rows = sorted((row for row in result.levels if row.system == best.system), key=lambda row: row.rate_per_s)
            table.add_row(
                best.system.name,
                best.system.split,
                f"{best.goodput_per_s:.2f}",
                f"{best.goodput_per_s / result.ceiling_per_s:.0%}",
                f"{result.ours.goodput_per_s / best.goodput_per_s:.2f}" if best.goodput_per_s else "-",
                " ".join(f"{row.attainment:.0%}" for row in rows),
            )
        console.print(table)
    console.print(bar_table("Bars", bars(results)))


def bars(results: Sequence[TraceRows]) -> list[Bar]:
    """Against the best baseline on every trace, and against colocated where prompts are long."""
    found = []
    for result in results:
        ours, strongest, colocated = (one.goodput_per_s for one in (result.ours, result.strongest, result.colocated))
        name = f"{result.trace}: slo / {result.strongest.system.name}"
        found.append(Bar(name, ours / strongest, BAR, at_least=True))
        over_colocated = LONG_CONTEXT_BAR if result.trace == LONG_CONTEXT else None
        found.append(Bar(f"{result.trace}: slo / colocated", ours / colocated, over_colocated, at_least=True))
        found.append(Bar(f"{result.trace}: oracle / slo", result.ceiling_per_s / ours, None, at_least=True))
    return found


def plot_goodput(results: Sequence[TraceRows], path: Path) -> None:
    """Goodput of every system, and attainment over the rate."""
    figure, panels = new_figure(5.5 * len(results), 4.2, len(results))
    for axes, result in zip(panels, results, strict=True):
        shown = sorted(result.best, key=lambda best: best.goodput_per_s)
        colours = [COLOURS[1] if best.system.policy == "slo" else COLOURS[0] for best in shown]
        axes.barh([best.system.name for best in shown], [best.goodput_per_s for best in shown], color=colours)
        axes.axvline(result.ceiling_per_s, color="black", linestyle="--", linewidth=1, label="oracle")
        axes.set_title(result.trace, fontsize=10)
        axes.set_xlabel("good requests per second")
        axes.legend(loc="lower right", fontsize=8)
    save_figure(figure, path)
