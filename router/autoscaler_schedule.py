"""Windows of the day in which a pool has other bounds.

    08:00-18:00 prefill>=4 decode>=6         every day
    mon-fri 22:00-06:00 decode<=2            begins on these days, may end on the next

Times are of the router's clock and zone. Where windows overlap, the largest minimum and the smallest maximum hold;
a minimum wins over a maximum.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..common.errors import ConfigError
from .autoscaler_types import DAY_S, Bounds, Pool

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WINDOW = re.compile(
    r"(?:([a-z]{3})(?:-([a-z]{3}))?\s+)?(\d\d):(\d\d)-(\d\d):(\d\d)((?:\s+(?:prefill|decode)[<>]=\d+)+)"
)
_LIMIT = re.compile(r"(prefill|decode)([<>])=(\d+)")


@dataclass(slots=True, frozen=True)
class Window:
    days: frozenset[int]  # 0 is Monday
    start_s: int  # of the day
    end_s: int
    at_least: tuple[tuple[str, int], ...]
    at_most: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, text: str) -> Window:
        """Raises ConfigError, which names the setting."""
        match = _WINDOW.fullmatch(text.strip().lower())
        if match is None:
            raise ConfigError(
                f"scale_schedule: {text!r} is not like '08:00-18:00 prefill>=4' or 'mon-fri 22:00-06:00 decode<=2'"
            )
        first, last, *clock, limits = match.groups()
        found = [(pool, sign, int(number)) for pool, sign, number in _LIMIT.findall(limits)]
        hours = [int(part) for part in clock]
        if max(hours[0], hours[2]) > 23 or max(hours[1], hours[3]) > 59:
            raise ConfigError(f"scale_schedule: {text!r} has a time that no day has")
        return cls(
            _days(text, first, last or first),
            hours[0] * 3600 + hours[1] * 60,
            hours[2] * 3600 + hours[3] * 60,
            tuple((pool, number) for pool, sign, number in found if sign == ">"),
            tuple((pool, number) for pool, sign, number in found if sign == "<"),
        )

    def holds(self, weekday: int, day_s: float) -> bool:
        if self.start_s < self.end_s:
            return weekday in self.days and self.start_s <= day_s < self.end_s
        return (weekday in self.days and day_s >= self.start_s) or (
            (weekday - 1) % 7 in self.days and day_s < self.end_s
        )


def _days(text: str, first: str | None, last: str | None) -> frozenset[int]:
    if first is None or last is None:
        return frozenset(range(7))
    if first not in _DAYS or last not in _DAYS:
        raise ConfigError(f"scale_schedule: {text!r}: days are {', '.join(_DAYS)}")
    begin, end = _DAYS.index(first), _DAYS.index(last)
    return frozenset((begin + offset) % 7 for offset in range((end - begin) % 7 + 1))


class Schedule:
    """All windows of a deployment."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._windows: Sequence[Window] = [Window.parse(text) for text in texts]

    def bounds(self, pool: Pool, usual: Bounds, weekday: int, day_s: float) -> Bounds:
        """What holds at this time."""
        now = [window for window in self._windows if window.holds(weekday, day_s % DAY_S)]
        least = max([usual.at_least, *(n for window in now for name, n in window.at_least if name == pool)])
        most = min([usual.at_most, *(n for window in now for name, n in window.at_most if name == pool)])
        return replace(usual, at_least=least, at_most=max(least, most))

    def soon(self, pool: Pool, usual: Bounds, weekday: int, day_s: float, ahead_s: float) -> Bounds:
        """What must hold by the time that a worker wished for now is there: a minimum is met when it begins."""
        now = self.bounds(pool, usual, weekday, day_s)
        days, later_s = divmod(day_s + ahead_s, DAY_S)
        then = self.bounds(pool, usual, (weekday + int(days)) % 7, later_s)
        least = max(now.at_least, then.at_least)
        return replace(now, at_least=least, at_most=max(least, now.at_most))
