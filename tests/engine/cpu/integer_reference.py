"""Products with quantized weights as they are defined, in NumPy: what C++ must give to the bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvferry.engine.weights.grouped import E2M1, GroupedWeight, split_nibbles

Floats = npt.NDArray[np.float32]
Whole = npt.NDArray[np.int64]


SEGMENT = 32  # inputs of a group that share a scale


def quantize(x: Floats) -> tuple[Whole, Floats]:
    """Return each row as whole numbers from -127 to 127 and its scale; a row that is not finite has no numbers."""
    most = np.abs(x).max(1, keepdims=True)
    is_sound = np.isfinite(most) & (most >= np.float32(2.0**-100))
    factor = np.float32(127) / np.where(is_sound, most, np.float32(1))
    numbers = np.where(is_sound, np.rint(x * factor), 0).astype(np.int64)
    scales = np.where(is_sound, most / np.float32(127), np.where(np.isfinite(most), np.float32(0), np.float32("nan")))
    return numbers, scales


def product(x: Tensor, weight: GroupedWeight) -> Floats:
    """[rows, num_inputs] -> [rows, num_outputs]: groups in ascending order, each by fused multiply-add."""
    rows = x.float().numpy()
    if weight.order is not None:
        rows = rows[:, weight.order.numpy()]
    numbers, size = _numbers(weight), weight.group_size
    scales = weight.scales / 2 if weight.is_e2m1 else weight.scales
    y = np.zeros((len(rows), weight.num_outputs), np.float32)
    for group in range(weight.scales.shape[1]):
        part = slice(group * size, (group + 1) * size)
        parts, row_sums = _group(rows[:, part], numbers[:, part])
        y = fused(parts, scales[:, group].numpy(), y)
        if weight.minima is not None:
            y = fused(row_sums, weight.minima[:, group].numpy(), y)
    return y


def _group(rows: Floats, numbers: Whole) -> tuple[Floats, Floats]:
    """Return what a group's numbers make of its inputs, and the sum of these."""
    parts, row_sums = np.zeros((len(rows), len(numbers)), np.float32), np.zeros((len(rows), 1), np.float32)
    for at in range(0, rows.shape[1], SEGMENT):
        with np.errstate(invalid="ignore"):
            inputs, scales = quantize(rows[:, at : at + SEGMENT])
        products = inputs @ numbers[:, at : at + SEGMENT].T
        parts = fused(products.astype(np.float32), scales, parts)
        row_sums = fused(inputs.sum(1, keepdims=True).astype(np.float32), scales, row_sums)
    return parts, row_sums


def fused(a: Floats, b: Floats, c: Floats) -> Floats:
    """Return a * b + c, rounded once: in float64 the product is exact, and a sum rounded to odd is as good as exact
    for a second rounding (Boldo and Melquiond 2008).
    """
    exact, plus = a.astype(np.float64) * b, c.astype(np.float64)
    total = exact + plus
    other = total - exact
    error = (exact - (total - other)) + (plus - other)
    is_even = total.view(np.int64) & 1 == 0
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & is_even, np.nextafter(total, towards), total).astype(np.float32)


def _numbers(weight: GroupedWeight) -> Whole:
    if weight.is_e2m1:  # twice what they mean
        return (2 * torch.tensor(E2M1)).long()[split_nibbles(weight.numbers).long()].numpy()
    if weight.bits == 8:
        return weight.numbers.numpy().astype(np.int64)
    return split_nibbles(weight.numbers).numpy().astype(np.int64) - (8 if weight.minima is None else 0)
