"""Plain numbers rounded to few bits: the nearest ones that a group with a scale, maybe a minimum, can hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def round_groups(
    groups: Tensor, bits: int, *, symmetric: bool, floats: Sequence[float] = ()
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[rows, groups, inputs] float32 -> numbers as `GroupedWeight` has them, not packed; scales, minima [rows, groups].

    Ties are rounded to even. A symmetrical group of 4 bits reaches with -8, its only number of that size, to its
    largest weight, whatever sign that has: its scale may be below zero. `floats`: the sizes that numbers mean, if they
    are floats, the largest last.
    """
    low, high = groups.amin(2), groups.amax(2)
    if floats:
        scales = torch.maximum(high, -low) / floats[-1]
        return _nearest_float(groups, scales, floats), scales, None
    if not symmetric:
        scales = (high - low) / (2**bits - 1)
        numbers = _nearest(groups - low.unsqueeze(2), scales, 0, 2**bits - 1)
        return (numbers - 128, scales, low + 128 * scales) if bits == 8 else (numbers, scales, low)
    if bits == 8:
        scales = torch.maximum(high, -low) / 127
        return _nearest(groups, scales, -127, 127), scales, None
    scales = torch.where(high > -low, high, low) / -8
    return _nearest(groups, scales, -8, 7) + 8, scales, None


def _nearest(values: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """Return values / scales in whole numbers; 0 where a scale is."""
    scales = scales.unsqueeze(2)
    return (values / scales.masked_fill(scales == 0, 1)).round_().clamp_(low, high)


def _nearest_float(values: Tensor, scales: Tensor, floats: Sequence[float]) -> Tensor:
    """Return the bits of the float that is nearest to values / scales; of two as near the one nearer to zero."""
    sizes = torch.tensor(floats, device=values.device)
    scaled = values / scales.masked_fill(scales == 0, 1).unsqueeze(2)
    return torch.bucketize(scaled.abs(), (sizes[1:] + sizes[:-1]) / 2) + len(sizes) * (scaled < 0)
