"""Goodput of placement policies beside each other, live and simulated. Pure, but for the plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.table import Table

from kvferry.benchmarks.shared.bars import Bar
from kvferry.benchmarks.shared.live_load import Figures
from kvferry.benchmarks.shared.pools import Pools
from kvferry.tools.load.plot import COLOURS, new_figure, save_figure
from kvferry.tools.load.report import milliseconds

OURS = "slo"
COLOCATED = "colocated"


@dataclass(slots=True, frozen=True)
class Setting:
    """A system under test."""

    policy: str  # or "colocated"
    pools: Pools

    @property
    def router_policy(self) -> str:
        """Of its router, which for colocated workers has only to share requests out."""
        return "least_loaded" if self.policy == COLOCATED else self.policy

    def __str__(self) -> str:
        return f"{self.policy} {self.pools}"


@dataclass(slots=True, frozen=True)
class Run:
    setting: Setting
    level: float
    figures: Figures


Expected = Mapping[tuple[Setting, float], float]


def live_goodput(runs: Sequence[Run], level: float) -> dict[str, float]:
    """By policy, the mean over the rounds."""
    policies = dict.fromkeys(run.setting.policy for run in runs)
    return {
        policy: fmean(run.figures.goodput_per_s for run in runs if run.level == level and run.setting.policy == policy)
        for policy in policies
    }


def ratios(goodput: Mapping[str, float]) -> tuple[float | None, float | None]:
    """Of ours to the best other, and to colocated."""
    others = [value for policy, value in goodput.items() if policy != OURS]
    best = max(others, default=0.0)
    colocated = goodput.get(COLOCATED, 0.0)
    own = goodput.get(OURS, 0.0)
    return own / best if best else None, own / colocated if colocated else None


def bars_of(runs: Sequence[Run], expected: Expected, tried: Sequence[Run] = ()) -> list[Bar]:
    """`tried`: runs that chose the splits."""
    bars = []
    for level in dict.fromkeys(run.level for run in runs):
        to_best, to_colocated = ratios(live_goodput(runs, level))
        bars.append(Bar(f"{level:g}: goodput, slo / best other", to_best, 1.0, at_least=True))
        bars.append(Bar(f"{level:g}: goodput, slo / colocated", to_colocated, None))
        simulated = {setting.policy: value for (setting, at), value in expected.items() if at == level}
        if simulated:
            sim_best, sim_colocated = ratios(simulated)
            bars.append(Bar(f"{level:g}: simulated, slo / best other", sim_best, None))
            bars.append(Bar(f"{level:g}: simulated, slo / colocated", sim_colocated, None))
            bars.append(Bar(f"{level:g}: live and simulated point the same way", _same(to_best, sim_best), 1, True))
    figures = [run.figures for run in (*runs, *tried)]
    failed, sent = (sum(one) for one in zip(*((f.num_failed, f.num_sent) for f in figures), strict=True))
    bars.append(Bar("requests that failed", failed, 0, count=sent))
    return bars


def _same(live: float | None, simulated: float | None) -> float | None:
    if live is None or simulated is None:
        return None
    return float((live >= 1.0) == (simulated >= 1.0))


def run_table(runs: Sequence[Run], expected: Expected) -> Table:
    table = Table(title="goodput: requests/s that met both objectives", title_justify="left")
    for column in ("level", "system"):
        table.add_column(column)
    columns = ("goodput", "simulated", "good", "refused", "failed", "TTFT p50", "p90", "TPOT p50", "p90 ms")
    for column in columns:
        table.add_column(column, justify="right")
    for run in sorted(runs, key=lambda one: one.level):
        figures = run.figures
        simulated = expected.get((run.setting, run.level))
        table.add_row(
            f"{run.level:g}", str(run.setting), f"{figures.goodput_per_s:.2f}",
            "-" if simulated is None else f"{simulated:.2f}", f"{figures.num_good} of {figures.num_sent}",
            str(figures.num_refused), str(figures.num_failed), milliseconds(figures.ttft_ms.p50),
            milliseconds(figures.ttft_ms.p90), milliseconds(figures.tpot_ms.p50), milliseconds(figures.tpot_ms.p90),
        )  # fmt: skip
    return table


def draw(runs: Sequence[Run], expected: Expected, path: Path, commit: str) -> None:
    """Bars for each level: live, and what the simulator expected as a dash."""
    levels = list(dict.fromkeys(run.level for run in runs))
    figure, panels = new_figure(4.5 * len(levels), 4, len(levels))
    for axes, level in zip(panels, levels, strict=True):
        goodput = live_goodput(runs, level)
        simulated = {setting.policy: value for (setting, at), value in expected.items() if at == level}
        for place, (policy, value) in enumerate(goodput.items()):
            axes.bar(place, value, 0.7, color=COLOURS[1] if policy == OURS else COLOURS[0])
            if policy in simulated:
                axes.plot((place - 0.35, place + 0.35), (simulated[policy],) * 2, color="black", linewidth=2)
        pools = {run.setting.policy: str(run.setting.pools) for run in runs}
        axes.set_xticks(range(len(goodput)), [f"{policy}\n{pools[policy]}" for policy in goodput], fontsize=8)
        axes.set_ylabel("goodput (requests/s); black: simulated")
        axes.set_title(f"load {level:g} of the colocated capacity", fontsize=9)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(f"Placement policies, live ({commit})", fontsize=10)
    save_figure(figure, path)
