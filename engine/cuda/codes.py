"""`Codes` are matrices in few bits as a GPU keeps them: one or many of one size, multiplied by as they are.

    code     numbers                       what one stands for
    PLAIN    bfloat16 [m, out, in]         itself
    FLOAT8   e4m3 [m, out, in]             number * scale      `rounds_rows`
    INT8     int8 [m, out, in]             number * scale (+ minimum)
    INT4     uint8 [m, out, in / 2]        (nibble - 8) * scale, or nibble * scale + minimum
    E2M1     uint8 [m, out, in / 2]        float of 4 bits * scale
    MXFP4    uint8 [m, out, in / 2]        float of 4 bits * 2^(scale - 127)

An even input's nibble is the low one. Scales and minima are float32 [m, out, groups], MXFP4's uint8. Where a card
multiplies 8-bit floats, rows become such, too, with a scale for each group of their inputs.

What multiplies by them: `coded.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Self, cast

import torch
from torch import Tensor

from ..weights.float8 import has_products
from ..weights.grouped import GroupedWeight
from ..weights.weight import DenseWeight, Weight
from .float8 import Float8Weight

_LEAST_ROUNDED = 32  # 8-bit floats, of one group, that a card multiplies at once


class Code(IntEnum):
    """A kind of numbers. The order tells the kernel how many bits they have, and which are floats."""

    PLAIN = 0
    FLOAT8 = 1
    INT8 = 2
    INT4 = 3
    E2M1 = 4
    MXFP4 = 5


@dataclass(slots=True, frozen=True)
class Codes:
    code: Code
    numbers: Tensor
    scales: Tensor | None
    minima: Tensor | None = None

    @classmethod
    def of(cls, weights: Sequence[Weight]) -> Self:
        """Move matrices without an `obstacle` into tensors of which they are parts from then on."""
        first = weights[0]
        if isinstance(first, DenseWeight):
            return cls(Code.PLAIN, _stack_plain(cast(Sequence[DenseWeight], weights)), None)
        if isinstance(first, Float8Weight):
            return cls(Code.FLOAT8, *_stack_float8(cast(Sequence[Float8Weight], weights)))
        assert isinstance(first, GroupedWeight)
        return cls(code_of(first), *_stack_grouped(cast(Sequence[GroupedWeight], weights)))

    @property
    def num_matrices(self) -> int:
        return len(self.numbers)

    @property
    def num_outputs(self) -> int:
        return self.numbers.shape[1]

    @property
    def num_inputs(self) -> int:
        return self.numbers.shape[2] * (1 if self.code <= Code.INT8 else 2)

    @property
    def group_size(self) -> int:
        """Count the inputs that share a scale; all of them where there are none."""
        return self.num_inputs if self.scales is None else self.num_inputs // self.scales.shape[2]

    @property
    def rounds_rows(self) -> bool:
        """Tell whether rows are rounded to 8-bit floats before they are multiplied by these."""
        fits = self.code is Code.FLOAT8 and self.group_size % _LEAST_ROUNDED == 0
        return fits and has_products(self.numbers.device)


def code_of(weight: GroupedWeight) -> Code:
    """Return the kind of its numbers."""
    if weight.is_e4m3:
        return Code.FLOAT8
    if weight.is_e2m1:
        return Code.MXFP4 if weight.scales.dtype == torch.uint8 else Code.E2M1
    return Code.INT8 if weight.bits == 8 else Code.INT4


def _stack_plain(weights: Sequence[DenseWeight]) -> Tensor:
    stack = torch.stack([weight.plain for weight in weights])
    for weight, part in zip(weights, stack, strict=True):
        weight.plain = part
    return stack


def _stack_float8(weights: Sequence[Float8Weight]) -> tuple[Tensor, Tensor]:
    numbers = _stack_numbers([weight.numbers for weight in weights])
    scales = torch.stack([weight.scales.view(-1, 1) for weight in weights])
    for weight, own, factors in zip(weights, numbers, scales, strict=True):
        weight.numbers, weight.scales = own, factors.view(1, -1)
    return numbers, scales


def _stack_grouped(weights: Sequence[GroupedWeight]) -> tuple[Tensor, Tensor, Tensor | None]:
    numbers = _stack_numbers([weight.numbers for weight in weights])
    scales = torch.stack([weight.scales for weight in weights])
    least = [weight.minima for weight in weights if weight.minima is not None]
    minima = torch.stack(least) if least else None
    for place, weight in enumerate(weights):
        weight.numbers, weight.scales = numbers[place], scales[place]
        weight.minima = None if minima is None else minima[place]
    return numbers, scales, minima


def _stack_numbers(numbers: Sequence[Tensor]) -> Tensor:
    """Stack numbers as bytes: what only moves 8-bit floats has kernels for these in every torch."""
    return torch.stack([own.view(torch.uint8) for own in numbers]).view(numbers[0].dtype)
