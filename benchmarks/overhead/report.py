"""The overhead of the routers: a table with the bars, a JSON file, a plot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvferry.benchmarks.shared.bars import Bar, bar_table
from kvferry.tools.load.environment import Environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.plot import COLOURS, new_figure, save_figure
from kvferry.tools.load.stats import Distribution

OURS = "kvferry"
Value = Callable[[str], float | None]  # of a system


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
class OverheadReport:
    phases: tuple[Phase, ...]
    num_workers: int
    num_words: int
    environment: Environment

    @property
    def systems(self) -> list[str]:
        return list(dict.fromkeys(phase.system for phase in self.phases))

    def of(self, system: str, load: str) -> Phase:
        return next(phase for phase in self.phases if phase.system == system and phase.load == load)

    def bars(self) -> list[Bar]:
        return [bar for of_systems in self.figures().values() for bar in of_systems.values()]

    def figures(self) -> dict[str, dict[str, Bar]]:
        """Each figure by its name, of each system; ours is held to something."""
        short, long, many = "64 lanes, 32 tokens", "64 lanes, 256 tokens", "500 streams"
        figures: tuple[tuple[str, str, float, Value], ...] = (
            ("CPU of a request of 32 tokens", "us", 1000.0, lambda s: self.of(s, short).cpu_us_per_request),
            ("CPU of one token more", "us", 15.0, lambda s: self._slope(s, short, long)),
            ("CPU of a token of 500 streams", "us", 15.0, lambda s: self.of(s, many).cpu_us_per_token),
            ("added to the first token, p50", "ms", 2.0, lambda s: self.of(s, "one stream").added_first_ms.p50),
            ("added to a token of 500 streams, p99", "ms", 5.0, lambda s: self.of(s, many).added_token_ms.p99),
        )
        return {
            name: {s: Bar(f"{s}: {name}", value(s), limit if s == OURS else None, unit=unit) for s in self.systems}
            for name, unit, limit, value in figures
        }

    def _slope(self, system: str, short: str, long: str) -> float:
        """CPU of a token, from what answers that are longer cost more."""
        less, more = self.of(system, short), self.of(system, long)
        num_more = more.num_tokens / more.num_requests - less.num_tokens / less.num_requests
        return (more.cpu_us_per_request - less.cpu_us_per_request) / num_more


def print_overhead(report: OverheadReport, console: Console) -> None:
    title = f"{report.num_workers} decode workers, prompts of {report.num_words} words"
    console.print(bar_table(title, report.bars()))
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
    bars = [bar.as_json() for bar in report.bars()]
    phases = [asdict(phase) for phase in report.phases]
    settings = {"num_workers": report.num_workers, "num_words": report.num_words}
    body = {"environment": asdict(report.environment), "settings": settings, "bars": bars, "phases": phases}
    save_json(body, path)


def plot_overhead(report: OverheadReport, path: Path) -> None:
    """Each figure as bars, one for each system, with the bar that ours has to stay below."""
    figures = report.figures()
    drawing, panels = new_figure(3.0 * len(figures), 3.4, len(figures))
    for panel, (name, of_systems) in zip(panels, figures.items(), strict=True):
        highest = 0.0
        for position, (system, bar) in enumerate(of_systems.items()):
            if bar.value is not None:
                panel.bar(position, bar.value, color=COLOURS[position], label=system)
                panel.text(position, bar.value, f"{bar.value:.3g}", ha="center", va="bottom", fontsize=8)
            if bar.bar is not None:
                panel.axhline(bar.bar, color="black", linestyle="--", linewidth=1)
            highest = max(highest, bar.value or 0.0, bar.bar or 0.0)
            panel.set_ylabel(bar.unit)
        panel.set_xticks(range(len(of_systems)), list(of_systems), fontsize=8)
        panel.set_title(name, fontsize=8)
        panel.set_ylim(0, 1.15 * highest)
    commit = report.environment.git_commit or f"version {report.environment.kvferry_version}"
    drawing.suptitle(f"What a router costs on one core; dashed: kvferry's bar ({commit})", fontsize=10)
    save_figure(drawing, path)


def _pair(distribution: Distribution) -> str:
    return f"{distribution.p50 or 0:.2f} / {distribution.p99 or 0:.2f}"
