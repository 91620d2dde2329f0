"""Objectives say what a request is to get: times to its first and between its later tokens, and how urgent it is.

A long prompt takes long on an empty machine too, so an objective for first tokens is the larger of a constant and a
multiple of the prompt's own unloaded time.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...common.request import BACKGROUND_PRIORITY, DEFAULT_CLASS

__all__ = [
    "BACKGROUND",
    "BACKGROUND_CLASS",
    "DEFAULT_CLASS",
    "DEFAULT_STRETCH",
    "NO_OBJECTIVES",
    "Objectives",
    "Pace",
    "filled_step_s",
]

DEFAULT_STRETCH = 3.0

# Share of an objective for times per token up to which steps are filled, and planned to be by the autoscaler; above it
# noise breaks the pace of streams. Not derived: who changes it measures with benchmarks.goodput and
# benchmarks.placement_live.
_FILLED_SHARE = 0.92

Pace = tuple[int, float]  # of a stream: its priority, and the mean time per token that it is to keep (seconds)


@dataclass(slots=True, frozen=True)
class Objectives:
    """The objectives of one class of requests. None: no limit of that kind."""

    ttft_s: float | None = None  # from arrival to the first token
    ttft_stretch: float = DEFAULT_STRETCH  # a first token may take so many times what it takes on empty workers
    tpot_s: float | None = None  # mean time per output token after the first
    priority: int = 0  # lower goes first
    deadline_s: float | None = None  # for the whole answer
    weight: float = 1.0  # a tenant gets so many times the share of one with weight 1, of the same priority

    def ttft_limit_s(self, unloaded_s: float) -> float | None:
        """The limit for a prompt whose first token takes `unloaded_s` seconds on empty workers."""
        return None if self.ttft_s is None else max(self.ttft_s, self.ttft_stretch * unloaded_s)


def filled_step_s(tpot_s: float) -> float:
    """Return how long a step may be expected to take where tokens are to come in `tpot_s`."""
    return _FILLED_SHARE * tpot_s


NO_OBJECTIVES = Objectives()
BACKGROUND_CLASS = "batch"  # what books call requests that nobody waits for
BACKGROUND = Objectives(priority=BACKGROUND_PRIORITY)
