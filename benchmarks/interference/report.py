"""The figures of the interference measurement, and how they are shown: table, JSON, plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kvferry.tools.load.cores import CoreUse
from kvferry.tools.load.endpoint import RequestRecord
from kvferry.tools.load.environment import Environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.plot import COLOURS, new_figure, save_figure
from kvferry.tools.load.report import milliseconds
from kvferry.tools.load.stats import Distribution

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GROWING_RATIO = 1.25


@dataclass(slots=True, frozen=True)
class Phase:
    """What the streams' readers saw in one phase."""

    duration_s: float
    token_gap_ms: Distribution  # tokens of one chunk are 0 ms apart
    chunk_gap_ms: Distribution
    stream_ttft_ms: Distribution
    stream_tokens_per_s: float  # all streams together
    num_failed: int
    cores: CoreUse


@dataclass(slots=True, frozen=True)
class LongPrompts:
    """The long prompts of the disturbed phase, in order."""

    ttft_s: tuple[float, ...]  # of those whose first token came
    num_answered: int
    num_failed: int
    unanswered_for_s: float | None  # age of the last one if its first token had not come when the phase ended
    slope_s: float | None  # seconds that each TTFT adds to the one before it, least squares
    is_growing: bool  # the last third waits longer than the first third by more than a quarter
    errors: tuple[str, ...]


@dataclass(slots=True, frozen=True)
class SystemResult:
    name: str
    about: str
    quiet: Phase
    disturbed: Phase
    long_prompts: LongPrompts


@dataclass(slots=True, frozen=True)
class InterferenceReport:
    model: str
    scenario: str
    cores: tuple[int, ...]
    systems: tuple[SystemResult, ...]
    environment: Environment


def long_prompts(records: Sequence[RequestRecord], end_s: float) -> LongPrompts:
    """Of all long prompts sent until `end_s`; the last may be unfinished."""
    ttft_s = [record.ttft_s for record in records if record.ttft_s is not None and record.error is None]
    waiting = [record for record in records if record.finished_s is None and record.ttft_s is None]
    return LongPrompts(
        ttft_s=tuple(round(value, 4) for value in ttft_s),
        num_answered=sum(record.is_ok for record in records),
        num_failed=sum(record.error is not None for record in records),
        unanswered_for_s=round(end_s - waiting[0].sent_s, 3) if waiting else None,
        slope_s=slope(ttft_s),
        is_growing=is_growing(ttft_s),
        errors=tuple(sorted({record.error for record in records if record.error is not None})),
    )


def slope(values: Sequence[float]) -> float | None:
    """Least squares against 0, 1, 2 ...; None for fewer than two values."""
    if len(values) < 2:
        return None
    middle, average = (len(values) - 1) / 2, mean(values)
    spread = sum((index - middle) ** 2 for index in range(len(values)))
    return sum((index - middle) * (value - average) for index, value in enumerate(values)) / spread


def is_growing(values: Sequence[float]) -> bool:
    third = len(values) // 3
    return third > 0 and median(values[-third:]) > _GROWING_RATIO * median(values[:third])


def print_interference(report: InterferenceReport, console: Console) -> None:
    console.print(f"{report.model} on cores {list(report.cores)}; {report.scenario}", highlight=False)
    table = Table(title="gaps between the tokens of a stream, and the streams' TTFT (ms)", title_justify="left")
    table.add_column("system")
    table.add_column("phase")
    for column in ("p50", "p99", "longest", "gaps", "chunk p99", "tokens/s", "TTFT p50", "TTFT max", "foreign"):
        table.add_column(column, justify="right")
    for system in report.systems:
        for label, phase in (("quiet", system.quiet), ("disturbed", system.disturbed)):
            table.add_row(system.name if label == "quiet" else "", label, *_phase_cells(phase))
    console.print(table)
    console.print(_long_table(report.systems))


def _phase_cells(phase: Phase) -> list[str]:
    gap = phase.token_gap_ms
    figures = [gap.p50, gap.p99, gap.max]
    return [
        *map(milliseconds, figures),
        f"{gap.count:,}",
        milliseconds(phase.chunk_gap_ms.p99),
        f"{phase.stream_tokens_per_s:.1f}" + (f" ({phase.num_failed} failed)" if phase.num_failed else ""),
        milliseconds(phase.stream_ttft_ms.p50),
        milliseconds(phase.stream_ttft_ms.max),
        f"{phase.cores.foreign:.2f}",
    ]


def _long_table(systems: Sequence[SystemResult]) -> Table:
    table = Table(title="long prompts", title_justify="left")
    table.add_column("system")
    for column in ("answered", "failed", "TTFT first", "median", "last", "each adds", "growing"):
        table.add_column(column, justify="right")
    for system in systems:
        prompts = system.long_prompts
        ttft_s = prompts.ttft_s
        figures = [f"{value:.2f} s" for value in (ttft_s[0], median(ttft_s), ttft_s[-1])] if ttft_s else ["-"] * 3
        each_adds = "-" if prompts.slope_s is None else f"{prompts.slope_s:+.3f} s"
        counts = [str(prompts.num_answered), str(prompts.num_failed)]
        table.add_row(system.name, *counts, *figures, each_adds, "yes" if prompts.is_growing else "no")
    return table


def write_interference(report: InterferenceReport, path: Path) -> None:
    save_json(asdict(report), path)


def plot_interference(report: InterferenceReport, path: Path) -> None:
    """Left: gaps between tokens, quiet and disturbed. Right: TTFT of the long prompts in order."""
    from matplotlib.ticker import MaxNLocator

    figure, (gaps, longs) = new_figure(11, 4.5, 2)
    for row, system in enumerate(report.systems):
        colour = COLOURS[row % len(COLOURS)]
        _draw_gaps(gaps, row - 0.08, system.quiet.token_gap_ms, colour, is_filled=False)
        _draw_gaps(gaps, row + 0.08, system.disturbed.token_gap_ms, colour, is_filled=True)
        ttft_s = system.long_prompts.ttft_s
        label = f"{system.name} ({system.long_prompts.num_answered} answered)"
        longs.plot(range(1, len(ttft_s) + 1), ttft_s, "o-", color=colour, markersize=3, linewidth=1, label=label)
    gaps.set_yscale("log")
    gaps.set_ylabel("gap between two tokens of a stream (ms)")
    gaps.set_xticks(range(len(report.systems)), [system.name for system in report.systems])
    gaps.set_xlim(-0.6, len(report.systems) - 0.4)
    gaps.set_title("p50, p99 and longest; hollow: quiet, filled: with long prompts", fontsize=9)
    gaps.grid(axis="y", alpha=0.3)
    longs.set_ylim(bottom=0)
    longs.set_xlim(0.5, max(2, *(len(system.long_prompts.ttft_s) for system in report.systems)) + 0.5)
    longs.xaxis.set_major_locator(MaxNLocator(integer=True))
    longs.set_xlabel("long prompt, in order")
    longs.set_ylabel("TTFT (s)")
    longs.set_title("TTFT of the long prompts", fontsize=9)
    longs.grid(alpha=0.3)
    longs.legend(fontsize=8)
    commit = report.environment.git_commit or f"version {report.environment.kvferry_version}"
    figure.suptitle(f"{report.model}, {len(report.cores)} cores; {report.scenario} ({commit})", fontsize=9)
    save_figure(figure, path)


def _draw_gaps(axes: Axes, x: float, gap: Distribution, colour: str, *, is_filled: bool) -> None:
    """A line from p50 to the longest gap, with each figure on the mark's outer side."""
    if gap.p50 is None or gap.p99 is None or gap.max is None:
        return
    axes.plot([x, x], [gap.p50, gap.max], color=colour, linewidth=1)
    side, align = (6, "left") if is_filled else (-6, "right")
    for value, marker in ((gap.p50, "o"), (gap.p99, "^"), (gap.max, "s")):
        axes.plot(x, value, marker, color=colour, markersize=6, markerfacecolor=colour if is_filled else "white")
        text = milliseconds(value)
        axes.annotate(text, (x, value), (side, 0), textcoords="offset points", fontsize=7, va="center", ha=align)
