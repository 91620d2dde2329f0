"""A `Stack` holds one matrix of each of a rank's experts, by which rows sorted by expert are multiplied at once.

    y[r, o] = sum over i of x[r, i] * matrices[expert of r][o, i]          `ends`: behind each expert's last row

Plain numbers in bfloat16 and 8-bit floats with a scale for each output and each row (`float8.py`) have products of
torch's on some cards; all else has our own (`coded.py`). Rows behind the last end have any numbers, and so have their
results.

Not run on a card: shown on an emulated device, which takes the arguments that CUDA's products take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..weights.float8 import groups_products, to_float8
from ..weights.weight import DenseWeight, Weight
from . import coded
from .codes import Code, Codes
from .float8 import Float8Weight

_PLAIN_MAJORS = (9, 10)  # capabilities of the cards on which torch's product does not wait for the host
_MULTIPLE = 8  # numbers of 2 bytes, of which it takes rows and columns


class Stack(Protocol):
    def product(self, x: Tensor, ends: Tensor, order: Tensor | None = None) -> Tensor:
        """Return [sorted rows, outputs] in bfloat16.

        x: [rows, inputs] bfloat16. `ends`: [experts] int32. `order`: the row of x that each sorted row is; None: x is
        sorted.
        """
        ...


class PlainStack:
    """Implements `Stack`."""

    def __init__(self, matrices: Tensor) -> None:
        """`matrices`: [experts, outputs, inputs] bfloat16."""
        self._matrices = matrices.transpose(1, 2)

    def product(self, x: Tensor, ends: Tensor, order: Tensor | None = None) -> Tensor:
        return torch._grouped_mm(x if order is None else x[order], self._matrices, offs=ends)


class Float8Stack:
    """Implements `Stack`. A row is rounded once, however many experts take it."""

    def __init__(self, codes: Codes) -> None:
        assert codes.scales is not None
        self._matrices, self._scales = codes.numbers.transpose(1, 2), codes.scales.squeeze(2)  # [experts, outputs]

    def product(self, x: Tensor, ends: Tensor, order: Tensor | None = None) -> Tensor:
        numbers, scales = to_float8(x)
        if order is not None:
            numbers, scales = _bytes(numbers)[order].view(numbers.dtype), scales[order]
        return torch._scaled_grouped_mm(
            numbers, self._matrices, scales.flatten(), self._scales, offs=ends, out_dtype=x.dtype, use_fast_accum=True
        )


def _bytes(numbers: Tensor) -> Tensor:
    """Look at 8-bit floats as bytes: what only moves them has kernels for bytes in every torch."""
    return numbers.view(torch.uint8)


class CodedStack:
    """Implements `Stack`, of numbers in any form, in bits that they have, by a kernel of our own."""

    def __init__(self, codes: Codes) -> None:
        self.codes = codes

    def product(self, x: Tensor, ends: Tensor, order: Tensor | None = None) -> Tensor:
        return coded.product(x, self.codes, ends, order)


def stack(weights: Sequence[Weight], device: torch.device) -> Stack:
    """Move matrices without an `obstacle` into one tensor, of which they are parts from then on."""
    codes = Codes.of(weights)
    if not _takes(weights, device):
        return CodedStack(codes)
    return Float8Stack(codes) if isinstance(weights[0], Float8Weight) else PlainStack(codes.numbers)


def plain(matrices: Tensor) -> Stack:
    """Make a stack of [experts, outputs, inputs] bfloat16, which stay where they are; inputs are a multiple of 16."""
    if _has_plain_products(matrices.device) and matrices.shape[1] % _MULTIPLE == 0:
        return PlainStack(matrices)
    return CodedStack(Codes(Code.PLAIN, matrices, None))


def obstacle(weights: Sequence[Weight], device: torch.device) -> str:
    """Say why a card does not multiply by these at once; nothing: it does."""
    return "" if _takes(weights, device) else coded.obstacle(weights, device)


def _takes(weights: Sequence[Weight], device: torch.device) -> bool:
    """Tell whether torch has a product of them that does not wait for the host."""
    if all(isinstance(weight, Float8Weight) for weight in weights):
        return groups_products(device)
    return (
        _has_plain_products(device)
        and all(isinstance(weight, DenseWeight) and weight.dtype == torch.bfloat16 for weight in weights)
        and not any(weight.num_inputs % _MULTIPLE or weight.num_outputs % (2 * _MULTIPLE) for weight in weights)
    )


def _has_plain_products(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] in _PLAIN_MAJORS
