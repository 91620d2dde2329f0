"""Arriving work is measured by the length of prompts: under lasting overload the longest ones make way.

    arrivals ─> seconds of work per second, by quarters of octaves of a prompt's own time ─> what fits, shortest first

Triage (triage.py) gives up on who cannot be served in time beside those that wait now. It does not know who is about to
come: a long prompt that is begun in a lull takes the time of many short ones of the next seconds. The load of the last
seconds says how many those will be.
"""

from __future__ import annotations

import math

_MEMORY_S = 15.0  # what is longer ago counts 1 / e and less; shorter lets long prompts in sooner
_SHARE = 0.8  # of the work that can be done: arrivals are not even; nearer to 1 admits longer prompts into bursts
_SETTLE_S = 5.0  # after the first arrival, before which every length has room; shorter judges by too few arrivals
_PER_OCTAVE = 4  # steps of a doubling by which lengths are told apart
_LEAST_S = 1e-3  # the shortest length that is told apart
_NUM_LENGTHS = 80  # a quarter of an octave each: up to a thousand seconds
_MAX_LEVELS = 64  # priorities; of further ones nothing is known
_REBASE_S = 50 * _MEMORY_S  # weights grow with time and are made small again

_EDGES = tuple(_LEAST_S * 2 ** (number / _PER_OCTAVE) for number in range(_NUM_LENGTHS))


class ArrivalLoad:
    """`ArrivalLoad` is what arrives at one router. Time is the caller's."""

    def __init__(self) -> None:
        self._levels: dict[int, list[float]] = {}  # priority: weighted seconds of work, by length
        self._began_s: float | None = None
        self._base_s = 0.0  # an arrival at this time weighs 1

    def add(self, priority: int, work_s: float, now_s: float) -> None:
        """A request came, admitted or not. `work_s`: predicted for its prompt."""
        if self._began_s is None:
            self._began_s = self._base_s = now_s
        weight = self._weight(now_s)
        level = self._levels.get(priority)
        if level is None:
            if len(self._levels) >= _MAX_LEVELS:
                return
            level = self._levels[priority] = [0.0] * _NUM_LENGTHS
        level[_length_of(work_s)] += work_s * weight

    def longest_s(self, priority: int, now_s: float, rate: float) -> float:
        """Prompts of this priority that take so long or longer have no room beside shorter and more urgent ones.
        Infinite: all have. `rate`: seconds of work that are done in a second.
        """
        if self._began_s is None or now_s - self._began_s < _SETTLE_S:
            return math.inf
        span_s = _MEMORY_S * (1.0 - math.exp((self._began_s - now_s) / _MEMORY_S))
        room_s = _SHARE * rate * span_s * self._weight(now_s)
        room_s -= sum(sum(level) for other, level in self._levels.items() if other < priority)
        for edge_s, work_s in zip(_EDGES, self._levels.get(priority, ()), strict=False):
            room_s -= work_s
            if work_s and room_s < 0:
                return edge_s
        return math.inf

    def _weight(self, now_s: float) -> float:
        if now_s - self._base_s > _REBASE_S:
            self._rebase(now_s)
        return math.exp((now_s - self._base_s) / _MEMORY_S)

    def _rebase(self, now_s: float) -> None:
        factor = math.exp((self._base_s - now_s) / _MEMORY_S)  # after hours without a request it is 0
        self._levels = {
            priority: [factor * work_s for work_s in level]
            for priority, level in self._levels.items()
            if factor * sum(level) > _LEAST_S
        }
        self._base_s = now_s


def _length_of(work_s: float) -> int:
    if work_s <= _LEAST_S:
        return 0
    return min(_NUM_LENGTHS - 1, int(_PER_OCTAVE * math.log2(work_s / _LEAST_S)))
