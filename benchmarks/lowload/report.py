"""From pairs of answers to ratios with their uncertainty, and from log lines to where the time went. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from rich.table import Table

from kvferry.benchmarks.shared.bars import Bar
from kvferry.tools.chaos.serve_system import LogLine
from kvferry.tools.load.endpoint import RequestRecord
from kvferry.tools.load.plot import COLOURS, new_figure, save_figure

RATIO_BAR = 1.02
_RESAMPLES = 2000
_PHASES = ("tokenize_ms", "queue_ms", "prefill_ms", "transfer_ms", "ttft_ms", "decode_ms", "total_ms")

Mean = Callable[[Sequence[float]], float]


@dataclass(slots=True, frozen=True)
class Pair:
    """The same request on both deployments: (measured one, colocated)."""

    ttft_s: tuple[float, float]
    tpot_s: tuple[float, float]

    @classmethod
    def of(cls, mine: RequestRecord, other: RequestRecord) -> Pair:
        return cls((mine.ttft_s or 0.0, other.ttft_s or 0.0), (mine.tpot_s or 0.0, other.tpot_s or 0.0))


def ratio(samples: Sequence[tuple[float, float]], mean: Mean) -> float:
    return mean([mine for mine, _ in samples]) / mean([other for _, other in samples])


def bootstrap(samples: Sequence[tuple[float, float]], mean: Mean, seed: int) -> tuple[float, float]:
    """95 % of what the ratio would have been with other pairs of the same kind."""
    dice = random.Random(seed)
    found = sorted(ratio(dice.choices(samples, k=len(samples)), mean) for _ in range(_RESAMPLES))
    return found[int(0.025 * _RESAMPLES)], found[int(0.975 * _RESAMPLES) - 1]


def ratio_bars(what: str, pairs: Sequence[Pair], seed: int) -> list[Bar]:
    """Medians and means of both figures."""
    bars = []
    for name, samples in (("TTFT", [pair.ttft_s for pair in pairs]), ("TPOT", [pair.tpot_s for pair in pairs])):
        for label, mean in (("p50", median), ("mean", fmean)):
            interval = bootstrap(samples, mean, seed)
            bars.append(
                Bar(f"{what}: {name} {label}", ratio(samples, mean), RATIO_BAR, count=len(pairs), interval=interval)
            )
            absolute = mean([mine for mine, _ in samples]) * 1e3
            bars.append(Bar(f"{what}: {name} {label} of slo", absolute, None, unit="ms"))
    return bars


@dataclass(slots=True, frozen=True)
class Phases:
    """Medians of one deployment under one load, as its router logged them."""

    system: str
    load: str
    shape: str
    num_requests: int
    num_handed_over: int
    medians_ms: dict[str, float]

    @classmethod
    def of(cls, system: str, load: str, shape: str, lines: Sequence[LogLine]) -> Phases:
        medians_ms = {}
        for phase in _PHASES:
            seen = [value for line in lines if isinstance(value := line.fields.get(phase), int | float)]
            if seen:
                medians_ms[phase] = median(seen)
        handed = sum(line.fields.get("prefill_workers") not in (["-"], [], None) for line in lines)
        return cls(system, load, shape, len(lines), handed, medians_ms)


def phase_table(rows: Sequence[Phases]) -> Table:
    table = Table(title="where the time goes: medians by the routers' logs, ms", title_justify="left")
    for column in ("shape", "load", "system"):
        table.add_column(column)
    for column in ("n", "handed over", *(phase.removesuffix("_ms") for phase in _PHASES)):
        table.add_column(column, justify="right")
    for row in rows:
        figures = [f"{row.medians_ms[phase]:.2f}" if phase in row.medians_ms else "-" for phase in _PHASES]
        table.add_row(row.shape, row.load, row.system, str(row.num_requests), str(row.num_handed_over), *figures)
    return table


def draw(bars: Sequence[Bar], path: Path, commit: str) -> None:
    """Ratios with their intervals, beside the bar."""
    shown = [bar for bar in bars if bar.interval is not None and bar.value is not None]
    figure, (axes,) = new_figure(8, 0.35 * len(shown) + 1.5, 1)
    for place, bar in enumerate(reversed(shown)):
        assert bar.interval is not None and bar.value is not None
        colour = COLOURS[2] if bar.is_met else COLOURS[1]
        axes.plot(bar.interval, (place, place), color=colour, linewidth=2)
        axes.plot([bar.value], [place], "o", color=colour)
    axes.set_yticks(range(len(shown)), [bar.what for bar in reversed(shown)], fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.axvline(RATIO_BAR, color=COLOURS[0], linestyle="--", label=f"bar {RATIO_BAR}")
    axes.set_xlabel("slo / colocated, with 95 % of a bootstrap")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    figure.suptitle(f"Low load ({commit})", fontsize=10)
    save_figure(figure, path)
