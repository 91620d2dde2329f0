"""Goodput over time of a deployment beside that of the best split under the same arrivals. Pure, but for the plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvferry.benchmarks.shared.bars import Bar
from kvferry.tools.load.plot import COLOURS, new_figure, save_figure

RECOVERED_SHARE = 0.9
RECOVERED_WITHIN_S = 60.0
_STEADY_WINDOWS = 3  # together: one alone holds few requests
_LATER_DIP = 0.8  # that later ones keep: who fell back had not recovered


@dataclass(slots=True, frozen=True)
class Sent:
    """One request of a run."""

    at_s: float  # since the run's start, as planned
    is_good: bool
    is_failed: bool  # neither answered nor refused


@dataclass(slots=True, frozen=True)
class RoleChange:
    at_s: float
    worker_id: str
    role: str


@dataclass(slots=True, frozen=True)
class Run:
    """One deployment under the load."""

    name: str  # "best", "wrong", "stuck"
    pools: str
    requests: tuple[Sent, ...]
    changes: tuple[RoleChange, ...] = ()

    @property
    def num_failed(self) -> int:
        return sum(request.is_failed for request in self.requests)

    def good_in(self, begin_s: float, end_s: float) -> int:
        return sum(request.is_good for request in self.requests if begin_s <= request.at_s < end_s)


@dataclass(slots=True, frozen=True)
class Case:
    """One kind of load on both splits. The runs have the same arrivals."""

    name: str
    load: str  # in words
    seconds: float
    window_s: float
    best: Run
    wrong: Run
    stuck: Run | None

    def goodput(self, run: Run) -> list[tuple[float, float]]:
        """(middle of a window, good requests per second of those that came then)."""
        count = int(self.seconds / self.window_s)
        return [
            ((number + 0.5) * self.window_s, self._good(run, number, number + 1) / self.window_s)
            for number in range(count)
        ]

    def _good(self, run: Run, first: int, end: int) -> int:
        return run.good_in(first * self.window_s, end * self.window_s)

    def share_of_best(self, first: int, end: int) -> float | None:
        """Of windows [first, end); None where the best split had nothing good either."""
        best = self._good(self.best, first, end)
        return self._good(self.wrong, first, end) / best if best else None

    @property
    def recovered_s(self) -> float | None:
        """The end of the first window from which on the best split's goodput is there: 90 % of it in that window, in
        the three that begin with it and in all that are left, and never again less than 80 % in three. None: it never
        was, or the best split had none either.
        """
        count = int(self.seconds / self.window_s)
        threes = [self._share(number, number + _STEADY_WINDOWS) for number in range(count - _STEADY_WINDOWS + 1)]
        for number, share in enumerate(threes):
            left = self.share_of_best(number, count)
            if left is None:
                return None
            kept = (share, self._share(number, number + 1), left)
            if min(kept) >= RECOVERED_SHARE and min(threes[number:]) >= _LATER_DIP:
                return (number + 1) * self.window_s
        return None

    def _share(self, first: int, end: int) -> float:
        """As much as the best split where that had nothing either."""
        share = self.share_of_best(first, end)
        return 1.0 if share is None else share

    @property
    def later_share(self) -> float | None:
        """Of the best split's goodput, after the time that the bar allows."""
        first = int(RECOVERED_WITHIN_S / self.window_s)
        return self.share_of_best(first, int(self.seconds / self.window_s))

    def stuck_share(self) -> float | None:
        if self.stuck is None:
            return None
        end_s = max((request.at_s for request in self.stuck.requests), default=0.0)
        begin_s = end_s / 2
        best = self.best.good_in(begin_s, end_s)
        return self.stuck.good_in(begin_s, end_s) / best if best else None


def bars_of(case: Case) -> list[Bar]:
    runs = [run for run in (case.best, case.wrong, case.stuck) if run is not None]
    good = case.best.good_in(0, case.seconds)
    is_long = case.seconds > RECOVERED_WITHIN_S
    return [
        Bar("90 % of the best split's goodput, reached after", case.recovered_s, RECOVERED_WITHIN_S, unit="s"),
        Bar(
            f"goodput after {RECOVERED_WITHIN_S:g} s / best split's",
            case.later_share,
            RECOVERED_SHARE if is_long else None,
            at_least=True,
        ),
        Bar("requests that failed", sum(run.num_failed for run in runs), 0, count=sum(len(r.requests) for r in runs)),
        Bar("role changes", len(case.wrong.changes), None),
        Bar("best split: share of good requests", good / max(1, len(case.best.requests)), None),
        Bar("no role change, second half: goodput / best split's", case.stuck_share(), None),
    ]


def draw(cases: Sequence[Case], path: Path, commit: str) -> None:
    figure, panels = new_figure(6.5 * len(cases), 4.2, len(cases))
    for axes, case in zip(panels, cases, strict=True):
        for colour, run in zip(COLOURS, (case.best, case.wrong, case.stuck), strict=False):
            if run is None:
                continue
            points = case.goodput(run)
            if run is case.stuck:
                end_s = max((request.at_s for request in run.requests), default=0.0)
                points = [point for point in points if point[0] <= end_s]
            label = f"{run.pools} ({run.name}{', with role changes' if run is case.wrong else ''})"
            axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=colour, label=label, markersize=3)
        for change in case.wrong.changes:
            axes.axvline(change.at_s, color=COLOURS[3], linewidth=1)
            axes.text(change.at_s, 0.02, f" {change.worker_id} -> {change.role}", fontsize=7, rotation=90,
                      transform=axes.get_xaxis_transform())  # fmt: skip
        if case.recovered_s is not None:
            axes.axvline(case.recovered_s, color="black", linestyle="--", linewidth=1, label="90 % of the best split")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("s")
        axes.set_ylabel("good requests/s, by arrival")
        axes.set_title(f"{case.name}: {case.load}", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(f"The wrong split, and role changes ({commit})", fontsize=10)
    save_figure(figure, path)
