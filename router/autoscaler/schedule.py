"""The bounds of a pool at a time of the day (`settings/windows.py` has the windows).

Times are of the router's clock and zone. Where windows overlap, the largest minimum and the smallest maximum hold;
a minimum wins over a maximum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ...settings.windows import Window
from .scale_types import DAY_S, Bounds, Pool


class Schedule:
    """All windows of a deployment."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._windows: Sequence[Window] = [Window.parse(text) for text in texts]

    def bounds(self, pool: Pool, usual: Bounds, weekday: int, day_s: float) -> Bounds:
        """Return the bounds that hold at this time."""
        now = [window for window in self._windows if window.holds(weekday, day_s % DAY_S)]
        least = max([usual.at_least, *(n for window in now for name, n in window.at_least if name == pool)])
        most = min([usual.at_most, *(n for window in now for name, n in window.at_most if name == pool)])
        return replace(usual, at_least=least, at_most=max(least, most))

    def soon(self, pool: Pool, usual: Bounds, weekday: int, day_s: float, ahead_s: float) -> Bounds:
        """Return the bounds by the time that a worker asked for now is there: a minimum is met when it begins."""
        now = self.bounds(pool, usual, weekday, day_s)
        days, later_s = divmod(day_s + ahead_s, DAY_S)
        then = self.bounds(pool, usual, (weekday + int(days)) % 7, later_s)
        least = max(now.at_least, then.at_least)
        return replace(now, at_least=least, at_most=max(least, now.at_most))
