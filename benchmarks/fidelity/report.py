"""Simulated figures beside live ones: ratios, bars, distributions. Pure, but for the plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from kvferry.benchmarks.shared.bars import Bar
from kvferry.benchmarks.shared.live_load import Figures
from kvferry.benchmarks.shared.twin import SimulatedFigures
from kvferry.tools.load.plot import COLOURS, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

P50_BAR = 0.10
P99_BAR = 0.25


@dataclass(slots=True, frozen=True)
class Comparison:
    """One policy on one deployment."""

    policy: str
    pools: str
    rate_per_s: float
    around_ms: float  # of a request, beside what is simulated
    lone_ms: tuple[tuple[float, float], ...]  # first tokens of lone requests: live, simulated
    live: Figures
    simulated: tuple[SimulatedFigures, ...]  # one for each seed of the noise
    hindsight: tuple[SimulatedFigures, ...]  # with steps learned from the measured run itself
    live_ttft_ms: tuple[float, ...]
    live_tpot_ms: tuple[float, ...]


Read = Callable[[Figures | SimulatedFigures], float | None]
_FIGURES: tuple[tuple[str, Read, float, str], ...] = (
    ("TTFT p50", lambda figures: figures.ttft_ms.p50, P50_BAR, "ms"),
    ("TPOT p50", lambda figures: figures.tpot_ms.p50, P50_BAR, "ms"),
    ("throughput", lambda figures: figures.output_tokens_per_s, P50_BAR, "tokens/s"),
    ("TTFT p99", lambda figures: figures.ttft_ms.p99, P99_BAR, "ms"),
    ("TPOT p99", lambda figures: figures.tpot_ms.p99, P99_BAR, "ms"),
)


def bars_of(comparison: Comparison) -> list[Bar]:
    """How far off each figure is, as a share of the live one."""
    bars = []
    for name, read, limit, unit in _FIGURES:
        what, live = f"{comparison.policy}: {name}", read(comparison.live)
        simulated = _median_of(read, comparison.simulated)
        error, hindsight = _error(simulated, live), _error(_median_of(read, comparison.hindsight), live)
        bars.append(Bar(f"{what}, |simulated / live - 1|", error, limit, count=comparison.live.ttft_ms.count))
        bars.append(Bar(f"{what} live", live, None, unit=unit))
        bars.append(Bar(f"{what} simulated", simulated, None, unit=unit))
        bars.append(Bar(f"{what}, off with the run's own steps", hindsight, None))
    return [
        *bars,
        Bar(f"{comparison.policy}: goodput live", comparison.live.goodput_per_s, None, unit="/s"),
        Bar(f"{comparison.policy}: goodput simulated", _goodput(comparison), None, unit="/s"),
        Bar(f"{comparison.policy}: requests refused live", comparison.live.num_refused, None),
        Bar(f"{comparison.policy}: requests failed live", comparison.live.num_failed, 0),
        Bar(f"{comparison.policy}: of a request, not simulated", comparison.around_ms, None, unit="ms"),
    ]


def _goodput(comparison: Comparison) -> float:
    return median(figures.goodput_per_s for figures in comparison.simulated)


def _median_of(read: Read, figures: Sequence[SimulatedFigures]) -> float | None:
    found = [value for one in figures if (value := read(one)) is not None]
    return median(found) if found else None


def _error(simulated: float | None, live: float | None) -> float | None:
    return abs(simulated / live - 1) if simulated is not None and live else None


def draw(comparisons: Sequence[Comparison], path: Path, commit: str) -> None:
    """Percentiles of the simulation over the live distribution."""
    figure, panels = new_figure(10, 4 * len(comparisons), 2 * len(comparisons))
    for index, comparison in enumerate(comparisons):
        for axes, name, live in zip(
            panels[2 * index : 2 * index + 2],
            ("ttft_ms", "tpot_ms"),
            (comparison.live_ttft_ms, comparison.live_tpot_ms),
            strict=True,
        ):
            _draw_panel(axes, comparison, name, live)
    figure.set_size_inches(4.2 * len(panels), 4)
    figure.suptitle(f"Simulated and live ({commit})", fontsize=10)
    save_figure(figure, path)


def _draw_panel(axes: Axes, comparison: Comparison, name: str, live: Sequence[float]) -> None:
    ordered = sorted(live)
    shares = [(rank + 1) / len(ordered) for rank in range(len(ordered))]
    axes.step(ordered, shares, where="post", color=COLOURS[0], label=f"live ({len(ordered)})")
    for figures in comparison.simulated:
        found = getattr(figures, name)
        points = [(found.p50, 0.5), (found.p90, 0.9), (found.p99, 0.99)]
        axes.plot([x for x, _ in points], [y for _, y in points], "o", color=COLOURS[1], markersize=4)
    axes.plot([], [], "o", color=COLOURS[1], label="simulated p50, p90, p99")
    axes.set_title(f"{comparison.policy}, {comparison.rate_per_s:.2f} requests/s", fontsize=9)
    axes.set_xlabel(f"{name.removesuffix('_ms').upper()} (ms)")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
