"""An imbalance says how much longer uneven parts take than even ones, where the largest is waited for."""

from __future__ import annotations

from collections.abc import Sequence


def imbalance(loads: Sequence[Sequence[float]]) -> float:
    """Return the sum of each layer's largest load over the sum of its mean ones; 1 where there is none."""
    mean = sum(sum(layer) / len(layer) for layer in loads if layer)
    return sum(max(layer) for layer in loads if layer) / mean if mean > 0 else 1.0
