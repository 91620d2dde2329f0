"""Virtual time: one heap of events. Nothing sleeps and nothing reads a real clock, so a run is a function of its input.

at / after ─> heap of (time, number) ─> run: the next event's handler

A handler that may come too late (its worker died, its plan changed) carries a number of its own and compares it.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

Handler = Callable[..., object]


class Kernel:
    """The event loop of one simulated world, and its clock (`common.clock.Clock`)."""

    __slots__ = ("_heap", "_number", "_time_s", "num_events")

    def __init__(self) -> None:
        self.num_events = 0
        self._time_s = 0.0
        self._number = 0
        self._heap: list[tuple[float, int, Handler, tuple[object, ...]]] = []

    def now(self) -> float:
        return self._time_s

    def at(self, time_s: float, handler: Handler, *args: object) -> None:
        """Run `handler(*args)` then; events of one time keep the order of the calls."""
        self._number += 1
        heappush(self._heap, (time_s, self._number, handler, args))

    def after(self, delay_s: float, handler: Handler, *args: object) -> None:
        self._number += 1
        heappush(self._heap, (self._time_s + delay_s, self._number, handler, args))

    def run(self, until: Callable[[], bool]) -> None:
        """Events in order, until `until` holds after one of them or none is left."""
        heap = self._heap
        while heap:
            self._time_s, _, handler, args = heappop(heap)
            self.num_events += 1
            handler(*args)
            if until():
                return
