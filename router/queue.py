"""The central queue: requests that no worker holds, in the order in which they are served.

Bounded for newcomers only: a request that comes back after a failed attempt was admitted before. Those that are put
off, or that wait for a worker of their own, do not count as waiting for room.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

from .live import Live

_Key = tuple[int, int]


def _key(live: Live) -> _Key:
    return (live.request.priority, live.request.arrival)


def _priority(live: Live) -> int:
    return live.request.priority


class RequestQueue:
    """Ordered by (priority, arrival); arrivals are unique."""

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.num_waiting = 0  # for room
        self._num_tokens = 0  # of their prompts
        self._items: list[Live] = []
        self._apart: set[Live] = set()  # they wait for something else

    def __len__(self) -> int:
        return len(self._items)

    @property
    def is_full(self) -> bool:
        """A newcomer would have to be refused."""
        return len(self._items) >= self.max_size

    def add(self, live: Live, *, apart: bool = False) -> None:
        insort(self._items, live, key=_key)
        if apart:
            self._apart.add(live)
        else:
            self._count(live, 1)

    def remove(self, live: Live) -> None:
        """Idempotent."""
        index = bisect_left(self._items, _key(live), key=_key)
        if index < len(self._items) and self._items[index] is live:
            del self._items[index]
            if live in self._apart:
                self._apart.discard(live)
            else:
                self._count(live, -1)

    def in_order(self) -> list[Live]:
        """A copy: placing and failing change the queue."""
        return list(self._items)

    def alone(self, now_s: float) -> list[Live]:
        """Those that wait for a worker of their own."""
        alone = [live for live in self._apart if live.must_run_alone and not live.is_put_off(now_s)]
        return sorted(alone, key=_key)

    def ahead_of(self, priority: int) -> tuple[int, int]:
        """Prompt tokens and requests that a newcomer would wait behind."""
        if not self._items or self._items[-1].request.priority <= priority:
            return self._num_tokens, self.num_waiting
        before = [
            live
            for live in self._items[: bisect_right(self._items, priority, key=_priority)]
            if live not in self._apart
        ]
        return sum(live.request.num_prompt_tokens for live in before), len(before)

    def least_urgent(self, priority: int) -> Live | None:
        """The youngest of the lowest priority below `priority` whose client has got nothing yet."""
        for live in reversed(self._items):
            if live.request.priority <= priority:
                return None
            if not live.request.is_resume:
                return live
        return None

    def _count(self, live: Live, sign: int) -> None:
        self.num_waiting += sign
        self._num_tokens += sign * live.request.num_prompt_tokens
