"""Figures beside their bars: the table that a benchmark ends with, and what of it goes into its JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from kvferry.common.errors import ConfigError


@dataclass(slots=True, frozen=True)
class Bar:
    """One figure and what it is held to."""

    what: str
    value: float | None  # None: there was nothing to measure
    bar: float | None  # None: shown beside the others, held to nothing
    at_least: bool = False  # else: at most
    unit: str = ""
    count: int | None = None  # of samples
    interval: tuple[float, float] | None = None  # confidence, 95 %

    @property
    def is_met(self) -> bool:
        if self.bar is None:
            return True
        if self.value is None:
            return False
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    @property
    def ratio(self) -> float | None:
        """Of the figure to its bar."""
        return self.value / self.bar if self.value is not None and self.bar else None

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "is_met": self.is_met}


def exit_code(bars: Sequence[Bar]) -> int:
    """Return 1 where one is missed, else 0. Raises ConfigError where there is none: nothing was measured."""
    if not bars:
        raise ConfigError("nothing was measured that has a bar")
    return 0 if all(bar.is_met for bar in bars) else 1


def bar_table(title: str, bars: Sequence[Bar]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    for column in ("value", "95 %", "bar", "of it", "n", ""):
        table.add_column(column, justify="right")
    for bar in bars:
        verdict = "" if bar.bar is None else "met" if bar.is_met else "MISSED"
        count = "" if bar.count is None else str(bar.count)
        table.add_row(bar.what, _shown(bar), _interval(bar), _limit(bar), _ratio(bar), count, verdict)
    return table


def _shown(bar: Bar) -> str:
    if bar.value is None:
        return "none"
    return f"{bar.value:,.0f} {bar.unit}".rstrip() if abs(bar.value) >= 100 else f"{bar.value:.3g} {bar.unit}".rstrip()


def _interval(bar: Bar) -> str:
    return "" if bar.interval is None else f"{bar.interval[0]:.3g} - {bar.interval[1]:.3g}"


def _limit(bar: Bar) -> str:
    return "" if bar.bar is None else f"{'>=' if bar.at_least else '<='} {bar.bar:g} {bar.unit}".rstrip()


def _ratio(bar: Bar) -> str:
    return "" if bar.ratio is None else f"{bar.ratio:.2f}"
