"""A CPU's rates: seconds of each part of a step, apart, as they were measured on it (`benchmarks/sizing/probe.py`)."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise


@dataclass(slots=True, frozen=True)
class CpuRates:
    """Seconds that one thing takes."""

    products: tuple[tuple[int, float], ...]  # (rows, of one weight), in order of rows, of which 1 is the first
    value_s: float
    score_s: float  # of one head and pair, whatever the head's size
    score_item_s: float  # more, for each number of the head
    cache_byte_s: float
    step_s: float
    layer_s: float = 0.0

    def product_s(self, rows: float) -> float:
        """Return what one weight takes: straight lines between what was measured, and on behind the last."""
        points = ((0, 0.0), *self.products) if rows < 1 else self.products
        index = min(max(1, bisect_left(points, rows, key=lambda point: point[0])), len(points) - 1)
        (low, low_s), (high, high_s) = points[index - 1], points[index]
        if rows > high:
            return high_s * rows / high
        return low_s + (high_s - low_s) * (rows - low) / (high - low)

    @property
    def bytes_per_s(self) -> float:
        """Return the rate of reading weights of two bytes, by a single row."""
        return 2 / self.products[0][1]

    @property
    def flops_per_s(self) -> float:
        return max(2 * rows / seconds for rows, seconds in self.products)

    def check(self) -> bool:
        """Tell whether these can be a machine's."""
        rows = [count for count, _ in self.products]
        is_ordered = len(rows) > 1 and rows[0] == 1 and all(low < high for low, high in pairwise(rows))
        others = (self.value_s, self.score_s, self.score_item_s, self.cache_byte_s, self.step_s, self.layer_s)
        return is_ordered and all(seconds > 0 for _, seconds in self.products) and min(others) >= 0
