"""Time is passed in: the only module that reads the system's clock.

Deadlines and leases count on CLOCK_BOOTTIME, which goes on while a machine is suspended; no wall clock
and no deadline crosses the wire, durations only.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

_STILL_S = 1.0  # nobody who looks several times a second is late by so much, but with the whole process


class Clock(Protocol):
    """A source of seconds that only grows. Values of two clocks are never compared."""

    def now(self) -> float:
        """Return seconds since an arbitrary start."""
        ...


class SystemClock:
    """Seconds since boot, suspended time included (Linux), else the monotonic clock."""

    __slots__ = ("_clock_id",)

    def __init__(self) -> None:
        self._clock_id: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

    def now(self) -> float:
        return time.clock_gettime(self._clock_id)


class OwnTime:
    """The time in which this process has run: none passes while it stands still, stopped or on a suspended machine.

    It goes by being looked at, which must be several times a second. Who judges others by a clock takes this one: what
    they have sent meanwhile is not read yet, and they may have stood still as well. Thread-safe.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_s = clock.now()
        self._still_s = 0.0

    def now(self) -> float:
        with self._lock:
            now_s = self._clock.now()
            if now_s - self._looked_s > _STILL_S:
                self._still_s += now_s - self._looked_s
            self._looked_s = now_s
            return now_s - self._still_s

    def look(self) -> bool:
        """Say whether the process has stood still since the last look."""
        before_s = self._still_s
        self.now()
        return self._still_s > before_s


def wall_time_us() -> int:
    """Return microseconds since 1970: routers order their requests by it, and nothing but that order rests on it."""
    return time.time_ns() // 1000


def wall_time_s() -> int:
    """Return seconds since 1970, for the `created` field of API answers only."""
    return int(time.time())


def week_s() -> float:
    """Return seconds since Monday's midnight in this machine's zone: for schedules and what is learned about days."""
    now = time.localtime()
    return float(((now.tm_wday * 24 + now.tm_hour) * 60 + now.tm_min) * 60 + now.tm_sec)
