"""Windows of the day in which a pool of workers has other bounds.

08:00-18:00 prefill>=4 decode>=6         every day
mon-fri 22:00-06:00 decode<=2            begins on these days, may end on the next
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..common.errors import ConfigError

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
        """Raises ConfigError."""
        match = _WINDOW.fullmatch(text.strip().lower())
        if match is None:
            raise ConfigError(f"{text!r} is not like '08:00-18:00 prefill>=4' or 'mon-fri 22:00-06:00 decode<=2'")
        first, last, *clock, limits = match.groups()
        found = [(pool, sign, int(number)) for pool, sign, number in _LIMIT.findall(limits)]
        hours = [int(part) for part in clock]
        if max(hours[0], hours[2]) > 23 or max(hours[1], hours[3]) > 59:
            raise ConfigError(f"{text!r} has a time that no day has")
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
        raise ConfigError(f"{text!r}: days are {', '.join(_DAYS)}")
    begin, end = _DAYS.index(first), _DAYS.index(last)
    return frozenset((begin + offset) % 7 for offset in range((end - begin) % 7 + 1))
