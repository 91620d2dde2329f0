"""Products of whole numbers of 8 bits with a scale for each output, as W8A8 checkpoints and `--quantization int8` have.

    up to 128 rows   rows stay bfloat16, and numbers are widened in registers (`coded.py`)
    more             rows are rounded to 8 bits, each with a scale of its own; products and sums are of whole numbers

    y[r, o] = (sum over i of x8[r, i] * numbers[o, i]) * scale of r * scale of o

A step of few rows waits for weights, which are read in their own bits either way. One of many is bound by arithmetic,
of which cards from Ampere on do twice as much in whole numbers. Rounding rows is what such checkpoints are calibrated
for, and what CPUs do (LLM.int8, arXiv 2208.07339, 2.1: a scale for each row and each column).

Not run on a card: shown on an emulated device, which takes the arguments that CUDA's product takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.quantization import CARD_ROWS
from ...models.storage import CARD_OUTPUTS, Form
from ..weights.grouped import GroupedWeight
from ..weights.weight import LoadedWeight
from . import coded

_MOST = 127.0
_ROWS = 1024  # that are rounded at once: in float32 a long step's would take more memory than its layer
_SUMS = 1 << 25  # of whole numbers at once: 128 MiB, and as much again in float32


def takes(weight: GroupedWeight) -> bool:
    """Tell whether a matrix has such numbers, and sizes that CUDA's product takes."""
    is_whole = weight.form == Form(8, weight.num_inputs, has_minima=False)
    return is_whole and weight.num_outputs % CARD_OUTPUTS == 0  # of inputs `coded.obstacle` says more


class Int8Weight(LoadedWeight):
    """Implements `Weight`, of a rank whose weights are loaded."""

    def __init__(self, weight: GroupedWeight) -> None:
        """`weight`: one that `takes` takes, without an obstacle for `coded`; it is given up here."""
        self._few = coded.CodedWeight(weight)
        self.num_outputs, self.num_inputs, self.dtype = self._few.num_outputs, self._few.num_inputs, self._few.dtype
        codes = self._few.codes
        assert codes.scales is not None
        self._numbers, self._scales = codes.numbers[0], codes.scales.view(1, -1)  # [out, in] int8, [1, out] float32

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if len(x) <= CARD_ROWS:
            return self._few.product(x, bias)
        rows, scales = to_int8(x)
        y = torch.empty(len(x), self.num_outputs, dtype=self.dtype, device=x.device)
        for first in range(0, len(x), step := max(CARD_ROWS, _SUMS // self.num_outputs)):
            # The last ones are computed with some before them again: CUDA's product takes no fewer than 17.
            own = slice(max(0, min(first, len(x) - CARD_ROWS)), first + step)
            sums = torch._int_mm(rows[own], self._numbers.t())
            y[own] = sums.float().mul_(scales[own]).mul_(self._scales)
        return y if bias is None else y.add_(bias)


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[n, m] -> the nearest whole numbers of 8 bits [n, m], and the scale of each row, [n, 1] float32.

    A row that is not finite has such a scale, and so have its results.
    """
    numbers = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    scales = rows.abs().amax(1, keepdim=True).float().div_(_MOST)
    divisors = scales.clamp(min=torch.finfo(torch.float32).tiny)
    for own, part, divisor in zip(*(torch.split(each, _ROWS) for each in (numbers, rows, divisors)), strict=True):
        own.copy_((part.float() / divisor).round_())
    return numbers, scales
