"""The overhead of the routers: a table with the bars, a JSON file, a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvferry.tools.load.environment import Environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.plot import COLOURS, new_figure, save_figure
from kvferry.tools.load.stats import Distribution

OURS = "kvferry"
Value = Callable[[str], float]  # of a system


@dataclass(slots=True, frozen=True)
class Phase:
    """One load on one router."""

    system: str
    load: str
    num_requests: int
    num_tokens: int  # that left and came within the measured time
    tokens_per_event: float  # above 1: tokens that came close together went out as one
    duration_s: float
    cpu_s: float  # of the router
    added_first_ms: Distribution  # client's time to the first token, less the stub's own
    added_token_ms: Distribution  # emission at the stub to arrival at the client

    @property
    def cpu_us_per_request(self) -> float:
        return self.cpu_s / self.num_requests * 1e6

    @property
    def cpu_us_per_token(self) -> float:
        """All of the router's work, whatever it was for."""
        return self.cpu_s / self.num_tokens * 1e6

    @property
    def busy(self) -> float:
        """Share of its core."""
        return self.cpu_s / self.duration_s


@dataclass(slots=True, frozen=True)
class Figure:
    """One line of the table: a value for each system, and what ours may be."""

    name: str
    unit: str
    bar: float
    values: dict[str, float]

    @property
    def is_met(self) -> bool:
        return OURS not in self.values or self.values[OURS] <= self.bar


@dataclass(slots=True, frozen=True)
class OverheadReport:
    phases: tuple[Phase, ...]
    num_workers: int
    num_words: int
    environment: Environment

    @property
    def systems(self) -> list[str]:
        return list(dict.fromkeys(phase.system for phase in self.phases))

    @property
    def is_met(self) -> bool:
        return all(figure.is_met for figure in self.figures())

    def of(self, system: str, load: str) -> Phase:
        return next(phase for phase in self.phases if phase.system == system and phase.load == load)

    def figures(self) -> Iterator[Figure]:
        short, long, many = "64 lanes, 32 tokens", "64 lanes, 256 tokens", "500 streams"
        yield self._figure(
            "CPU of a request of 32 tokens", "us", 1000.0, lambda s: self.of(s, short).cpu_us_per_request
        )
        yield self._figure("CPU of one token more", "us", 15.0, lambda s: self._slope(s, short, long))
        yield self._figure("CPU of a token of 500 streams", "us", 15.0, lambda s: self.of(s, many).cpu_us_per_token)
        yield self._figure("added to the first token, p50", "ms", 2.0, lambda s: _p50(self.of(s, "one stream")))
        yield self._figure("added to a token of 500 streams, p99", "ms", 5.0, lambda s: _p99(self.of(s, many)))

    def _figure(self, name: str, unit: str, bar: float, value: Value) -> Figure:
        return Figure(name, unit, bar, {system: value(system) for system in self.systems})

    def _slope(self, system: str, short: str, long: str) -> float:
        """CPU of a token, from what answers that are longer cost more."""
        less, more = self.of(system, short), self.of(system, long)
        num_more = more.num_tokens / more.num_requests - less.num_tokens / less.num_requests
        return (more.cpu_us_per_request - less.cpu_us_per_request) / num_more


def print_overhead(report: OverheadReport, console: Console) -> None:
    table = Table(
        title=f"{report.num_workers} decode workers, prompts of {report.num_words} words", title_justify="left"
    )
    table.add_column("")
    for column in (*report.systems, "bar"):
        table.add_column(column, justify="right")
    for figure in report.figures():
        values = [f"{figure.values[system]:,.2f} {figure.unit}" for system in report.systems]
        style = None if figure.is_met else "red"
        table.add_row(figure.name, *values, f"<= {figure.bar:g} {figure.unit}", style=style)
    console.print(table)
    console.print(_phases(report))


def _phases(report: OverheadReport) -> Table:
    table = Table()
    table.add_column("")
    for column in ("requests", "tokens/s", "tokens/event", "core busy", "first p50 / p99 ms", "token p50 / p99 ms"):
        table.add_column(column, justify="right")
    for phase in report.phases:
        table.add_row(
            f"{phase.system}: {phase.load}",
            f"{phase.num_requests:,}",
            f"{phase.num_tokens / phase.duration_s:,.0f}",
            f"{phase.tokens_per_event:.2f}",
            f"{phase.busy:.0%}",
            _pair(phase.added_first_ms),
            _pair(phase.added_token_ms),
        )
    return table


def write_overhead(report: OverheadReport, path: Path) -> None:
    figures = [{**asdict(figure), "is_met": figure.is_met} for figure in report.figures()]
    phases = [asdict(phase) for phase in report.phases]
    settings = {"num_workers": report.num_workers, "num_words": report.num_words}
    body = {"environment": asdict(report.environment), "settings": settings, "figures": figures, "phases": phases}
    save_json(body, path)


def plot_overhead(report: OverheadReport, path: Path) -> None:
    """Each figure as bars, one for each system, with the bar that ours has to stay below."""
    figures = list(report.figures())
    drawing, panels = new_figure(3.0 * len(figures), 3.4, len(figures))
    for panel, figure in zip(panels, figures, strict=True):
        for position, (system, value) in enumerate(figure.values.items()):
            panel.bar(position, value, color=COLOURS[position], label=system)
            panel.text(position, value, f"{value:.3g}", ha="center", va="bottom", fontsize=8)
        panel.axhline(figure.bar, color="black", linestyle="--", linewidth=1)
        panel.set_xticks(range(len(figure.values)), list(figure.values), fontsize=8)
        panel.set_ylabel(figure.unit)
        panel.set_title(figure.name, fontsize=8)
        panel.set_ylim(0, 1.15 * max(figure.bar, *figure.values.values()))
    commit = report.environment.git_commit or f"version {report.environment.kvferry_version}"
    drawing.suptitle(f"What a router costs on one core; dashed: kvferry's bar ({commit})", fontsize=10)
    save_figure(drawing, path)


def _pair(distribution: Distribution) -> str:
    return f"{distribution.p50 or 0:.2f} / {distribution.p99 or 0:.2f}"


def _p50(phase: Phase) -> float:
    return phase.added_first_ms.p50 or 0.0


def _p99(phase: Phase) -> float:
    return phase.added_token_ms.p99 or 0.0
