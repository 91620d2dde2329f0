"""Median TTFT and TPOT of every system in every cell as bars on a logarithmic scale, with the range over the runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.benchmarks.serve.report import FIGURES, ORDER, Comparison, Figure, Row, ServeReport, compare
from kvferry.tools.load.plot import COLOURS, new_figure, save_figure
from kvferry.tools.load.report import milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS: tuple[Figure, ...] = ("median_ttft_ms", "median_tpot_ms")
_GROUP_WIDTH = 0.84


def plot_serve(report: ServeReport, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, panels = new_figure(15, 5.2, len(_PANELS))
    for axes, shown in zip(panels, _PANELS, strict=True):
        _draw_panel(axes, report, shown)
    if report.rows:
        panels[0].legend(fontsize=8, loc="upper left")
    commits = sorted({row.environment.git_commit or row.environment.kvferry_version for row in report.rows})
    terms = report.terms
    figure.suptitle(f"{terms.model}, {terms.num_cores} cores, {terms.client} ({', '.join(commits)})", fontsize=9)
    save_figure(figure, path)


def _draw_panel(axes: Axes, report: ServeReport, figure: Figure) -> None:
    cells = list(dict.fromkeys(str(row.cell) for row in report.rows))
    systems = [name for name in ORDER if any(row.system == name for row in report.rows)]
    width = _GROUP_WIDTH / max(1, len(systems))
    axes.set_yscale("log")
    if spreads := [spread for row in report.rows if (spread := row.spread(figure)) is not None]:
        # With room for the figures above the bars. What is left to matplotlib is empty where all bars are alike.
        axes.set_ylim(min(spread.min for spread in spreads) / 2, max(spread.max for spread in spreads) * 6)
    comparisons = compare(report)
    for index, system in enumerate(systems):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot([], [], "s", color=colour, label=system)
        for row in report.rows:
            if row.system == system:
                x = cells.index(str(row.cell)) + (index - (len(systems) - 1) / 2) * width
                _draw_bar(axes, x, width, row, figure, colour, _ratio_text(comparisons, row, figure))
    axes.set_xticks(range(len(cells)), cells, fontsize=8)
    axes.set_xlim(-0.6, max(1, len(cells)) - 0.4)
    axes.set_xlabel("input tokens / output tokens / requests in flight")
    axes.set_ylabel(f"median {FIGURES[figure].removesuffix(' ms')} (ms)")
    axes.set_title("in brackets: the ratio to vLLM in the same mode", fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _draw_bar(axes: Axes, x: float, width: float, row: Row, figure: Figure, colour: str, ratio: str) -> None:
    spread = row.spread(figure)
    if spread is None:
        foot = axes.get_xaxis_transform()
        axes.text(x, 0.02, "no figure", rotation=90, fontsize=7, color="red", ha="center", transform=foot)
        return
    reach = [[spread.median - spread.min], [spread.max - spread.median]]
    axes.bar(x, spread.median, width * 0.92, color=colour, yerr=reach, error_kw={"elinewidth": 0.8, "alpha": 0.7})
    text = f" {milliseconds(spread.median)}{ratio}" + ("" if row.is_clean else " with failures")
    axes.text(x, spread.max, text, rotation=90, fontsize=7, ha="center", va="bottom")


def _ratio_text(comparisons: list[Comparison], row: Row, figure: Figure) -> str:
    for comparison in comparisons:
        if (comparison.system, str(comparison.cell)) == row.key:
            value = comparison.ratios[figure].value
            return "" if value is None else f" ({value:.2f})"
    return ""
