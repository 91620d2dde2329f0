"""Forecast of a token or request rate: level and trend (Holt), a profile of the day, and a jump where all that fails.

    observe(amount per interval) ─> level, trend ─> at(seconds ahead)

A rate made of requests is noisy by nature: what comes in an interval varies by the sum of squares of its parts (a
compound Poisson process). An observation within that noise moves the level a little; one far outside it, as at the
start of a spike, becomes the level at once. The profile remembers how the rate at each time of day related to the
day's level, and bends the forecast as soon as a day was seen. This file knows no workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .scale_types import DAY_S

_SURPRISE = 4.0  # standard deviations that make a jump; fewer follow noise, more follow a spike late
_TREND_DAMPING_S = 120.0  # a trend is believed for about so long; longer runs ahead of a load that levels off
_MAX_BEND = 2.0  # the largest factor from the day's profile; larger trusts what few days have shown more


class DayProfile:
    """The rate at each time of day, an average over days."""

    def __init__(self, num_bins: int = 96, gain: float = 0.5) -> None:
        self._gain = gain
        self._means: list[float | None] = [None] * num_bins
        self._bin: int | None = None  # the one that is being filled
        self._sum = self._seconds = 0.0

    def observe(self, day_s: float, rate: float, interval_s: float) -> None:
        index = self._index(day_s)
        if index != self._bin:
            self._close()
            self._bin = index
        self._sum += rate * interval_s
        self._seconds += interval_s

    def _close(self) -> None:
        """A bin's time is over: what it saw joins what it knew of other days."""
        if self._bin is not None and self._seconds > 0:
            new, old = self._sum / self._seconds, self._means[self._bin]
            self._means[self._bin] = new if old is None else old + self._gain * (new - old)
        self._sum = self._seconds = 0.0

    def bend(self, day_s: float, ahead_s: float) -> float:
        """The rate `ahead_s` later over the rate now, by what other days were like; 1 while that is not known."""
        now, then = self._between(day_s), self._between(day_s + ahead_s)
        if now is None or then is None or now <= 0:
            return 1.0
        return min(_MAX_BEND, max(1 / _MAX_BEND, then / now))

    def _index(self, day_s: float) -> int:
        return int(day_s % DAY_S / DAY_S * len(self._means))

    def _between(self, day_s: float) -> float | None:
        """Interpolated between the middles of two bins."""
        place = day_s % DAY_S / DAY_S * len(self._means) - 0.5
        left = math.floor(place)
        first, second = self._means[left % len(self._means)], self._means[(left + 1) % len(self._means)]
        if first is None or second is None:
            return None
        return first + (second - first) * (place - left)


class RateForecast:
    """The forecast of one rate, in units per second. `memory_s`: about how long an ordinary observation counts."""

    def __init__(self, memory_s: float = 60.0) -> None:
        self._memory_s = memory_s
        self._level: float | None = None
        self._trend = 0.0  # per second, per second
        # Mean square over mean of the parts, as the rate's variance is rate x part / interval; 0 until one was seen.
        self._part = 0.0
        self._profile = DayProfile()
        self._day_s = 0.0

    @property
    def level(self) -> float:
        return self._level or 0.0

    def observe(self, parts: Sequence[float], interval_s: float, day_s: float) -> None:
        """Take what came in the last `interval_s` seconds, a number for each request."""
        if interval_s <= 0:
            return
        rate = sum(parts) / interval_s
        self._day_s = day_s
        self._profile.observe(day_s, rate, interval_s)
        gain = 1.0 - math.exp(-interval_s / self._memory_s)
        if rate > 0:
            part = sum(x * x for x in parts) / sum(parts)
            self._part = self._part + gain * (part - self._part) if self._part else part
        if self._level is None:
            self._level = rate
            return
        expected = max(0.0, self._level + self._trend * interval_s)
        error = rate - expected
        noise = math.sqrt(max(expected, self._part / interval_s) * self._part / interval_s)
        if abs(error) > _SURPRISE * noise:
            self._level, self._trend = rate, 0.0
            return
        self._level = max(0.0, expected + gain * error)
        self._trend += gain * gain * error / interval_s

    def at(self, ahead_s: float) -> float:
        """The expected rate so many seconds from now."""
        if self._level is None:
            return 0.0
        reach_s = _TREND_DAMPING_S * (1.0 - math.exp(-ahead_s / _TREND_DAMPING_S))
        straight = self._level + self._trend * reach_s
        bent = self._level * self._profile.bend(self._day_s, ahead_s)
        return max(0.0, straight, bent) if self._level > 0 else 0.0
