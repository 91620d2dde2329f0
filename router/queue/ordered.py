"""A sorted sequence that stays cheap when it is long: short sorted runs, one behind the other.

Adding and removing cost a binary search and a move within one run; both ends and the beginning in order are at hand;
how much comes before a key is a sum over the runs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

_MAX_RUN = 256  # entries; a longer run moves more at each insertion, a shorter one makes more runs to sum over

# A tuple that begins with its key. Keys are unique: what stands behind one is never compared.
Entry = TypeVar("Entry", bound=tuple[Any, ...])


class Ordered(Generic[Entry]):
    """Entries in ascending order. `weight` is what `before` sums up."""

    __slots__ = ("_lasts", "_runs", "_size", "_sums", "_weight")

    def __init__(self, weight: Callable[[Entry], int] | None = None) -> None:
        self._weight = weight
        self._runs: list[list[Entry]] = []  # none is empty
        self._lasts: list[Entry] = []  # of each run
        self._sums: list[int] = []  # of each run's weights
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Entry]:
        for run in self._runs:
            yield from run

    def __reversed__(self) -> Iterator[Entry]:
        for run in reversed(self._runs):
            yield from reversed(run)

    @property
    def first(self) -> Entry:
        return self._runs[0][0]

    @property
    def weight(self) -> int:
        """The weight of all entries."""
        return sum(self._sums)

    def add(self, entry: Entry) -> None:
        self._size += 1
        if not self._runs:
            self._runs, self._lasts, self._sums = [[entry]], [entry], [self._weigh(entry)]
            return
        index = min(bisect_left(self._lasts, entry), len(self._runs) - 1)
        run = self._runs[index]
        insort(run, entry)
        self._lasts[index] = run[-1]
        self._sums[index] += self._weigh(entry)
        if len(run) > _MAX_RUN:
            self._split(index)

    def remove(self, entry: Entry) -> None:
        """Take out an entry, which must be there."""
        index = bisect_left(self._lasts, entry)
        run = self._runs[index]
        place = bisect_left(run, entry)
        assert run[place] == entry, entry
        del run[place]
        self._size -= 1
        if run:
            self._lasts[index] = run[-1]
            self._sums[index] -= self._weigh(entry)
        else:
            del self._runs[index], self._lasts[index], self._sums[index]

    def before(self, key: tuple[Any, ...]) -> tuple[int, int]:
        """(weight, number) of the entries whose key is smaller."""
        index = bisect_left(self._lasts, key)
        if index == len(self._runs):
            return sum(self._sums), self._size
        run = self._runs[index]
        place = bisect_left(run, key)
        weight = sum(self._sums[:index]) + sum(map(self._weigh, run[:place]))
        return weight, sum(map(len, self._runs[:index])) + place

    def _weigh(self, entry: Entry) -> int:
        return 0 if self._weight is None else self._weight(entry)

    def _split(self, index: int) -> None:
        run = self._runs[index]
        half = len(run) // 2
        parts = [run[:half], run[half:]]
        self._runs[index : index + 1] = parts
        self._lasts[index : index + 1] = [part[-1] for part in parts]
        self._sums[index : index + 1] = [sum(map(self._weigh, part)) for part in parts]
