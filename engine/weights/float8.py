"""Matrices in 8-bit floats (e4m3) with a scale for each output, as a checkpoint has them or rounded while it is loaded.

    w[o, i] = numbers[o, i] * scales[o]

A checkpoint's own numbers stay as they are, where one scale is for all inputs of an output, or of a rank's part of it;
one scale for several outputs is each one's. Others are rounded: an output's largest is 448 then, the largest of the
type, by a scale that is made of the whole output of the whole model, so ranks that share its inputs have the numbers of
one rank. A matrix takes its 8 bits from the start on: a model is loaded whose plain weights the memory does not hold.
GPUs have products of it (`engine/cuda/float8.py`); the one here is the reference, by the numbers that it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.quantization import FLOAT8_CAPABILITY, FLOAT8_MULTIPLE
from .weight import PIECE_ROWS, StoredMatrix, WeightSlot

_MAX = 448.0  # the largest number of the type
_GROUPING_MAJOR = 9  # capability of the cards that torch's product of many matrices in such floats is compiled for


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

    def put(self, matrix: Tensor | StoredMatrix, dim: int, start: int) -> None:
        """Keep 8-bit floats that have such scales already; round others by the scales of whole outputs."""
        if not isinstance(matrix, Tensor):
            own = matrix.narrow(dim, start, self.numbers.shape[dim])
            if own.is_e4m3 and own.scales.shape[1] == 1:
                self.numbers.copy_(own.numbers)
                self.scales.copy_(own.scales)
                return
        first_row, first_input = (0, start) if dim == 1 else (start, 0)
        for at in range(0, len(self.numbers), PIECE_ROWS):
            numbers, scales = (part[at : at + PIECE_ROWS] for part in (self.numbers, self.scales))
            piece = matrix.narrow(0, first_row + at, len(numbers))
            plain = piece if isinstance(piece, Tensor) else piece.dequantized()
            rounded, own_scales = to_float8(plain.to(numbers.device))
            numbers.copy_(rounded.narrow(1, first_input, numbers.shape[1]))
            scales.copy_(own_scales)
