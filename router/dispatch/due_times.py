"""Each tracked request has a due time, at which it is checked for what only time can tell: a heap of due times.

    add, enqueue ─> schedule(...) ─> due ─> judged, settled, sent away ─> schedule(its next limit) ─> due ...

A tick costs what is due and not what lives. Whoever changes a request so that one of its limits comes sooner than its
check schedules an earlier one; what is left of the later one is dropped when it comes up.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count

from ..state.tracked_request import TrackedRequest

MOST_AT_ONCE = 1000  # where more are due, such as all that a lost worker had, the rest waits for the next tick


class DueTimes:
    """`DueTimes` has an entry that counts for each tracked request of a router: `TrackedRequest.check_at_s`."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, TrackedRequest]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._heap)

    def schedule(self, tracked: TrackedRequest, at_s: float) -> None:
        """Have the request checked then, if not before."""
        if at_s < tracked.check_at_s:
            tracked.check_at_s = at_s
            heappush(self._heap, (at_s, next(self._numbers), tracked))

    def due(self, now_s: float) -> list[TrackedRequest]:
        """Return the requests to check now, the most overdue ones first. Each that goes on needs its next time."""
        found: list[TrackedRequest] = []
        while self._heap and self._heap[0][0] <= now_s and len(found) < MOST_AT_ONCE:
            at_s, _, tracked = heappop(self._heap)
            if at_s == tracked.check_at_s and not tracked.request.is_finished:
                tracked.check_at_s = float("inf")
                found.append(tracked)
        return found
