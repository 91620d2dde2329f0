"""The goodput comparison as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rich.table import Table

from kvferry.benchmarks.goodput_search import Best, System
from kvferry.benchmarks.plot import COLOURS, new_figure, save_figure
from kvferry.benchmarks.report import report_console

BAR = 1.15
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
        ratio = result.ours.goodput_per_s / result.strongest.goodput_per_s
        console.print(f"slo / best baseline ({result.strongest.system.name}): {ratio:.2f} (bar {BAR})")
        over = result.ours.goodput_per_s / result.colocated.goodput_per_s
        console.print(f"slo / colocated: {over:.2f} (bar {LONG_CONTEXT_BAR:g} on the long-context trace)")


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
