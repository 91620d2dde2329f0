"""The central queue: requests that no worker holds, in the order in which they are served.

Bounded for newcomers only: a request that comes back after a failed attempt was admitted before.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from ..common.errors import CapacityError
from .live import Live

_Key = tuple[int, int]


def _key(live: Live) -> _Key:
    return (live.request.priority, live.request.arrival)


class RequestQueue:
    """Ordered by (priority, arrival); arrivals are unique."""

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._items: list[Live] = []

    def __len__(self) -> int:
        return len(self._items)

    def check_room(self) -> None:
        """Raises CapacityError (429) when a newcomer would have to be refused."""
        if len(self._items) >= self._max_size:
            raise CapacityError(f"{len(self._items)} requests wait, the queue holds {self._max_size}")

    def add(self, live: Live) -> None:
        insort(self._items, live, key=_key)

    def remove(self, live: Live) -> None:
        """Idempotent."""
        index = bisect_left(self._items, _key(live), key=_key)
        if index < len(self._items) and self._items[index] is live:
            del self._items[index]

    def in_order(self) -> list[Live]:
        """A copy: placing and failing change the queue."""
        return list(self._items)
