"""Matrices in 8-bit floats (e4m3) with a scale for each output, rounded while a checkpoint is loaded.

    w[o, i] = numbers[o, i] * scales[o]          the largest number of an output is 448, the largest of the type

A scale is made of a whole output of the whole model, so ranks that share its inputs have the numbers of one rank. A
matrix takes its 8 bits from the start on: a model is loaded whose plain weights the memory does not hold. A checkpoint
that has such a scale itself keeps its numbers, where the largest of an output is 448.
GPUs have products of it (`engine/cuda/float8.py`); the one here is the reference, by the numbers that it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.quantization import FLOAT8_CAPABILITY, FLOAT8_MULTIPLE
from .weight import Weight, WeightSlot

_MAX = 448.0  # the largest number of the type
_GROUPING_MAJOR = 9  # capability of the cards that torch's product of many matrices in such floats is compiled for
_ROWS = 1024  # that are rounded at once: more take more memory beside the weights while these are loaded


def has_products(device: torch.device) -> bool:
    """Tell whether a device multiplies by 8-bit floats with a scale for each output."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY


def groups_products(device: torch.device) -> bool:
    """Tell whether a device multiplies rows by many such matrices at once."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _GROUPING_MAJOR


def takes(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> bool:
    """Tell whether such a device's product takes a matrix. `dtype`: of the rows that it is multiplied by."""
    return dtype == torch.bfloat16 and num_outputs % FLOAT8_MULTIPLE == 0 and num_inputs % FLOAT8_MULTIPLE == 0


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[n, m] -> the nearest 8-bit floats [n, m], and the scale of each row, [n, 1] float32. A row of zeros stays so."""
    scales = rows.abs().amax(1, keepdim=True).float().div_(_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    scaled = (rows.float() / scales).clamp_(-_MAX, _MAX)  # a quotient may be rounded up
    return scaled.to(torch.float8_e4m3fn), scales


def groups_to_float8(rows: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """[n, m] -> the nearest 8-bit floats [n, m], and the scale of each group of a row, [n, m / group_size] float32."""
    numbers, scales = to_float8(rows.reshape(-1, group_size))
    return numbers.view(rows.shape), scales.view(len(rows), -1)


class RoundedWeight:
    """Implements `Weight`, until it is traded for the form that a GPU multiplies by."""

    def __init__(self, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        """`numbers` [out, in] and `scales` [out, 1] are filled by whoever loads."""
        self.num_outputs, self.num_inputs = numbers.shape
        self.dtype, self.numbers, self.scales = dtype, numbers, scales

    @classmethod
    def of(cls, num_outputs: int, num_inputs: int, *, dtype: torch.dtype, device: torch.device) -> RoundedWeight:
        numbers = torch.zeros(num_outputs, num_inputs, dtype=torch.float8_e4m3fn, device=device)
        return cls(numbers, torch.ones(num_outputs, 1, device=device), dtype)

    def slots(
        self, name: str, shape: tuple[int, int], *, rows: slice = slice(None), dim: int = 0, start: int = 0
    ) -> Iterator[WeightSlot]:
        own = RoundedRows(self.numbers[rows], self.scales[rows])
        yield WeightSlot(f"{name}.weight", shape, own.numbers, dim, start, own)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.widened(), bias)

    def pack(self) -> None:
        raise AssertionError("only GPUs have it")

    def widened(self) -> Tensor:
        return (self.numbers.float() * self.scales).to(self.dtype)

    def take(self) -> tuple[Tensor, Tensor]:
        """Give numbers and scales up to the caller, who has a form of its own for them."""
        taken = self.numbers, self.scales
        self.numbers, self.scales = self.numbers.new_empty(0), self.scales.new_empty(0)
        return taken


@dataclass(slots=True, frozen=True)
class RoundedRows:
    """Implements `Rows`, of a `RoundedWeight`."""

    numbers: Tensor
    scales: Tensor
    takes_plain: ClassVar[bool] = True

    def put(self, matrix: Tensor | Weight, dim: int, start: int) -> None:
        """Round a plain matrix by the scales of whole outputs."""
        assert isinstance(matrix, Tensor)
        first = start if dim == 1 else 0
        whole = matrix if dim == 1 else matrix.narrow(0, start, len(self.numbers))
        parts = (torch.split(tensor, _ROWS) for tensor in (whole, self.numbers, self.scales))
        for plain, numbers, scales in zip(*parts, strict=True):
            rounded, own_scales = to_float8(plain.to(numbers.device))
            numbers.copy_(rounded.narrow(1, first, numbers.shape[1]))
            scales.copy_(own_scales)
