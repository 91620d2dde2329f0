"""Garbage collection, as rare as a program wants it that has much loaded and leaves little to collect."""

from __future__ import annotations

import gc

# Objects more than before, young collections, middle ones: until the next collection of each kind. Python's own are
# 700, 10, 10. A finished request leaves nothing to collect; what lives should not be gone through often, nor for long.
_THRESHOLDS = (10_000, 4, 50)


def collect_rarely() -> None:
    """Tune garbage collection for a process that is a router: what is loaded stays, so that a collection need not go
    through it, nor hold up a burst of tokens."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
