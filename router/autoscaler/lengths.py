"""The lengths of recent answers as they were, not their means: a sample in which older ones fade.

When traffic jumps, the first answers to end are the short ones. So a crowd of answers in one interval counts for no
more than a usual one does: the sample follows time, not numbers.

An answer's chance to be in the sample falls by half every `half_life_s`; which ones stay is decided by a random key
for each (weighted reservoir sampling by Efraimidis and Spirakis, with time as the weight), so one answer costs one
comparison, whatever the traffic.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from itertools import count

from .scale_types import AnswerLengths

# Answers whose mean is within some 2 % of all answers'. Fewer leave a pool of many workers one short, which full caches
# turn into minutes of missed objectives; more take longer in each decision: 7 ms of a core with these.
_SIZE = 2048
_USUAL_GAIN = 0.02  # weight of the newest interval in the usual number of answers; larger takes a crowd for usual


class LengthSample:
    """A sample of at most `size` answers."""

    def __init__(self, size: int = _SIZE, half_life_s: float = 600.0, seed: int = 0) -> None:
        self._size = size
        self._fade_s = half_life_s / math.log(2)
        self._random = random.Random(seed)
        self._heap: list[tuple[float, int, AnswerLengths]] = []  # the smallest key leaves first
        self._numbers = count()
        self._usual = 0.0  # answers in one `add`

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def answers(self) -> list[AnswerLengths]:
        return [answer for _, _, answer in self._heap]

    def add(self, answers: Sequence[AnswerLengths], now_s: float) -> None:
        """Take the answers of one interval."""
        if not answers:
            return
        self._usual += _USUAL_GAIN * (len(answers) - self._usual) if self._usual else len(answers)
        weight = math.log(min(1.0, self._usual / len(answers)))
        for answer in answers:
            # -log(-log(u) / w) with w = exp(now / fade + weight): the larger stay.
            key = now_s / self._fade_s + weight - math.log(-math.log(self._random.random() or 0.5))
            entry = (key, next(self._numbers), answer)
            if len(self._heap) < self._size:
                heapq.heappush(self._heap, entry)
            else:
                heapq.heappushpop(self._heap, entry)
