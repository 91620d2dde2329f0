"""Learns from missed objectives that the step models promise too much, and lets it be forgotten.

Only what a settled fleet of the right size measures counts: not the first answers of new workers, not those of a
fleet that was too small and known to be. A missed objective raises the load that a pool is sized for by a tenth, up
to a bound, because some misses no fleet can mend.
"""

from __future__ import annotations

import math

from .scale_types import Kept

_STEP = 1.1  # by which one conclusion raises the load; larger mends sooner and overshoots
_MOST = 1.5  # the largest factor, as some misses no fleet can mend; larger pays more for those
_FORGET_S = 1800.0  # after which a correction has faded to 1 / e; longer keeps a fleet larger than it need be
_AGAIN_S = 60.0  # between two steps, as the first one must have its effect; shorter overshoots
_ENOUGH = 200  # requests, before anything is concluded; fewer conclude from chance, more come late
_SIGMAS = 2.0  # by which the target must be missed; less is taken for chance


class Correction:
    """The correction of the load for one objective."""

    def __init__(self, target: float) -> None:
        self._target = target
        self._met = self._seen = 0
        self._seconds = 0.0
        self.factor = 1.0

    def observe(self, kept: Kept, interval_s: float, *, counts: bool) -> None:
        """`counts`: the fleet is settled and as large as it should be."""
        self.factor = 1.0 + (self.factor - 1.0) * math.exp(-interval_s / _FORGET_S)
        if not counts:
            self._met, self._seen, self._seconds = 0, 0, 0.0
            return
        self._met += kept.num_met
        self._seen += kept.num_seen
        self._seconds += interval_s
        if self._seen < _ENOUGH or self._seconds < _AGAIN_S:
            return
        noise = math.sqrt(self._target * (1.0 - self._target) / self._seen)
        if self._met / self._seen < self._target - _SIGMAS * noise:
            self.factor = min(_MOST, self.factor * _STEP)
        self._met, self._seen, self._seconds = 0, 0, 0.0
