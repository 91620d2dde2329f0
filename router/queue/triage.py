"""Triage gives up on waiting requests where not all can be served in time: on as few as possible.

    in order of service, each adds its work     somebody would start too late     the longest so far is put off

This is Moore's algorithm for the least number of late jobs (J. M. Moore, "An n job, one machine sequencing algorithm
for minimizing the number of late jobs", Management Science 15, 1968; the form is T. J. Hodgson's), with the pool seen
as one machine that does `rate` seconds of work a second. In order of due times it is optimal: no choice of requests to
put off leaves fewer late ones.

What is put off is not refused: it is served after what can make it, with a share of the service of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple, TypeVar

_LULL_S = 3.0  # who has that much time may find room, as load is uneven over some seconds; shorter puts off more

Item = TypeVar("Item")


class Waiting(NamedTuple):
    """One that waits."""

    start_by_s: float  # with a later start it is late; infinite: it never is
    work_s: float

    @property
    def can_miss(self) -> bool:
        return self.start_by_s != float("inf")

    def can_wait(self, now_s: float) -> bool:
        """Return whether it can wait for a moment in which few others come, and be in time all the same."""
        return self.can_miss and self.start_by_s - now_s >= _LULL_S


def put_off(waiting: Iterable[tuple[Item, Waiting]], now_s: float, rate: float) -> list[Item]:
    """Return who of those that wait, in order of service, makes way for the others."""
    off: list[Item] = []
    kept: list[tuple[float, int, Item]] = []  # the longest first
    numbers, work_s = count(), 0.0
    for item, one in waiting:
        work_s += one.work_s
        if one.can_miss:
            heappush(kept, (-one.work_s, -next(numbers), item))
        while kept and now_s + (work_s - one.work_s) / rate > one.start_by_s:
            longest_s, _, longest = heappop(kept)
            work_s += longest_s
            off.append(longest)
            if longest is item:
                break
    return off
