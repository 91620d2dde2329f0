"""The goodput comparison: what was found on each trace, as a table, as bars and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from kvferry.benchmarks.goodput.search import Best, System
from kvferry.benchmarks.goodput.setup import SETUP
from kvferry.benchmarks.shared.bars import Bar, bar_table
from kvferry.tools.load.plot import COLOURS, new_figure, save_figure
from kvferry.tools.load.report import report_console

BAR = 1.15
LONG_CONTEXT = "mooncake-conversation"
LONG_CONTEXT_BAR = 2.0


@dataclass(slots=True, frozen=True)
class Level:
    """One system at one rate."""

    system: System
    rate_per_s: float
    attainment: float
    goodput_per_s: float
    ttft_p50_ms: float | None
    ttft_p90_ms: float | None
    tpot_p50_ms: float | None
    tpot_p90_ms: float | None
    hit_rate: float


@dataclass(slots=True, frozen=True)
class TraceResult:
    """All systems on one trace."""

    trace: str
    part: str
    ceiling_per_s: float  # of goodput, for the oracle
    best: tuple[Best, ...]
    levels: tuple[Level, ...]

    @property
    def ours(self) -> Best:
        return next(best for best in self.best if best.system.policy == SETUP.policy)

    @property
    def baselines(self) -> tuple[Best, ...]:
        return tuple(best for best in self.best if best.system.policy != SETUP.policy)

    @property
    def strongest(self) -> Best:
        return max(self.baselines, key=lambda best: best.goodput_per_s)

    @property
    def colocated(self) -> Best:
        """The best of the colocated ones."""
        return max((b for b in self.baselines if not b.system.prefill), key=lambda best: best.goodput_per_s)


def print_goodput(results: Sequence[TraceResult]) -> None:
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


def bars(results: Sequence[TraceResult]) -> list[Bar]:
    """Against the best baseline on every trace, and against colocated where prompts are long."""
    found = []
    for result in results:
        ours, strongest, colocated = (one.goodput_per_s for one in (result.ours, result.strongest, result.colocated))
        name = f"{result.trace}: slo / {result.strongest.system.name}"
        found.append(Bar(name, _ratio(ours, strongest), BAR, at_least=True))
        over_colocated = LONG_CONTEXT_BAR if result.trace == LONG_CONTEXT else None
        found.append(Bar(f"{result.trace}: slo / colocated", _ratio(ours, colocated), over_colocated, at_least=True))
        found.append(Bar(f"{result.trace}: oracle / slo", _ratio(result.ceiling_per_s, ours), None, at_least=True))
    return found


def _ratio(one: float, other: float) -> float | None:
    return one / other if other else None


def plot_goodput(results: Sequence[TraceResult], path: Path) -> None:
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
