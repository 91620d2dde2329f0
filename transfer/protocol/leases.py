"""`usable_until` says when a lease that another worker gives, of KV to be written there or read, is over for us."""

from __future__ import annotations

# The rest pays for clocks that run up to a thousandth apart, and for the time between the look at the clock and the
# post.
_USABLE_SHARE = 0.95


def usable_until(asked_at: float, lease_s: float) -> float:
    """Return when a lease is over for us that counts from this question."""
    return asked_at + _USABLE_SHARE * lease_s
