"""A day of requests: a curve of arrival rates with the lengths of a recorded hour, and a spike in the middle.

rate(t) = mean x daily curve (night : evening = 1 : swing) x spike
arrivals: a Poisson process of that rate; lengths: rows of the trace, drawn evenly (prompt and answer together)
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvferry.tools.load.traces import TraceRow

DAY_S = 86400.0


@dataclass(slots=True, frozen=True)
class Spike:
    """So many times the usual rate for a while, from one moment to the next."""

    start_s: float
    duration_s: float
    factor: float

    def holds(self, at_s: float) -> bool:
        return self.start_s <= at_s < self.start_s + self.duration_s


@dataclass(slots=True, frozen=True)
class Day:
    """The arrival rate over time. It may begin and end at any hour."""

    mean_rate: float  # requests/s
    swing: float  # highest over lowest rate of the daily curve
    begin_s: float = 0.0  # of the day
    duration_s: float = DAY_S
    spike: Spike | None = None  # in seconds of the day

    def rate(self, day_s: float) -> float:
        depth = (self.swing - 1.0) / (self.swing + 1.0)
        # Lowest at 03:00, highest at 15:00.
        curve = 1.0 - depth * math.cos(2 * math.pi * (day_s / DAY_S - 3 / 24))
        spike = self.spike.factor if self.spike is not None and self.spike.holds(day_s) else 1.0
        return self.mean_rate * curve * spike


def arrivals(day: Day, rows: Sequence[TraceRow], seed: int) -> Iterator[tuple[float, int, int]]:
    """(seconds of the day, prompt tokens, answer tokens) in order."""
    dice = random.Random(seed)
    at_s, end_s = day.begin_s, day.begin_s + day.duration_s
    while True:
        # Thinning, against a bound of the next ten seconds.
        bound = 1.01 * max(day.rate(at_s), day.rate(at_s + 10.0))
        step_s = dice.expovariate(bound)
        if step_s > 10.0 or _crosses(day.spike, at_s, at_s + step_s):
            at_s += min(step_s, 10.0) if not _crosses(day.spike, at_s, at_s + step_s) else _edge(day.spike, at_s) - at_s
            continue
        at_s += step_s
        if at_s >= end_s:
            return
        if dice.random() * bound <= day.rate(at_s):
            row = rows[int(dice.random() * len(rows))]
            yield at_s, row.num_prompt_tokens, row.num_output_tokens


def _crosses(spike: Spike | None, start_s: float, end_s: float) -> bool:
    return spike is not None and start_s < _edge(spike, start_s) <= end_s


def _edge(spike: Spike | None, after_s: float) -> float:
    """The spike's next beginning or end; far away if there is none."""
    edges = (spike.start_s, spike.start_s + spike.duration_s) if spike is not None else ()
    return min((edge for edge in edges if edge > after_s), default=math.inf)
