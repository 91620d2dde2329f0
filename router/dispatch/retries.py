"""Retries have a budget: a token bucket for the whole router, and a pause before a repeated failure.

    each admitted request   + 0.1      a storm of errors adds a tenth to the load, not a multiple of it
    each second             + 1        so that a quiet router can retry at all
    a retry                 - 1        nothing left: the request fails with 503

Only errors that live workers report are charged. Such an error may be the first sign of a death, seen by a peer before
the router: a charge is held against the sessions that took part, and taken back if one of them is lost within
NOTICE_S. For so long a retry without a token waits for that news.
"""

from __future__ import annotations

import random

from ..state.failures import Charge

SHARE_OF_ADMITTED = 0.1  # tokens for each admitted request: what a storm of errors may add to the load
REFILL_PER_S = 1.0  # tokens a second, so that a quiet router can retry
BURST = 64.0  # failures at one moment, such as the open handoffs of a link that breaks, are no storm
_FIRST_PAUSE_S = 0.05  # before the second retry in a row for one reason; it doubles with each
_MAX_PAUSE_S = 1.0  # the longest pause; a longer one delays retries that would succeed


class RetryBudget:
    """Full at first. Time is the caller's."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._tokens = BURST
        self._refilled_s: float | None = None

    def on_admitted(self) -> None:
        self._add(SHARE_OF_ADMITTED)

    def charge(self, sessions: frozenset[int], now_s: float) -> Charge:
        return Charge(sessions, now_s, self._take(now_s))

    def pay(self, charge: Charge, now_s: float) -> bool:
        """Try again to pay for a retry that found the bucket empty."""
        charge.is_paid = charge.is_paid or self._take(now_s)
        return charge.is_paid

    def give_back(self) -> None:
        self._add(1.0)

    def pause_s(self, num_same: int) -> float:
        """Return the pause before a retry: none at first, then doubling with each failure of the same kind in a row."""
        if num_same < 2:
            return 0.0
        pause_s = min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (num_same - 2))
        return pause_s * self._rng.uniform(0.5, 1.5)

    def _take(self, now_s: float) -> bool:
        if self._refilled_s is not None:
            self._add((now_s - self._refilled_s) * REFILL_PER_S)
        self._refilled_s = now_s
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def _add(self, tokens: float) -> None:
        self._tokens = min(BURST, self._tokens + tokens)
