"""Rows are multiplied by matrices in few bits (`codes.py`), which are widened in registers.

    y[r, o] = sum over i of x[r, i] * what numbers[matrix of r, o, i] stands for

Rows that are rounded to 8-bit floats (`Codes.rounds_rows`) are so group by group, as a checkpoint of FP8 in blocks is
meant to be multiplied by (DeepSeek-V3, arXiv 2412.19437, 3.3.2): one input that is far out spoils its group alone.
The product is a kernel of Triton's (`coded_kernel.py`), which CUDA builds of torch for Linux bring. It waits for
nothing, so a graph may hold it.

Not run on a card: Triton's interpreter has shown the kernel's numbers, and its compiler has taken it for cards of 8.0,
8.9, 9.0, 10.0 and 12.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ...models.quantization import KEPT_GROUP
from ..weights.float8 import groups_to_float8
from ..weights.grouped import GroupedWeight, has_coded_products
from ..weights.weight import DenseWeight, LoadedWeight, Weight
from .codes import Code, Codes, code_of
from .float8 import Float8Weight

TILES = (16, 32, 64, 128)  # rows that are multiplied at once; the kernel is compiled for each


@dataclass(slots=True)
class Tile:
    """A size that `in_tiles_of` asks for."""

    num_rows: int
    is_taken: bool = False  # by some product


_tile = ContextVar[Tile | None]("tile", default=None)  # None: as many rows as suit the product


@contextmanager
def in_tiles_of(num_rows: int) -> Iterator[Tile]:
    """Have this thread's products take so many rows at once, one of `TILES`: results are the same, a tile is slower."""
    before = _tile.set(tile := Tile(num_rows))
    try:
        yield tile
    finally:
        _tile.reset(before)


def obstacle(weights: Sequence[Weight], device: torch.device) -> str:
    """Say why a device does not multiply by these, as many or as one; nothing: it does."""
    first = weights[0]
    if not has_coded_products(device):
        return "this card is older than 8.0, or torch came without Triton"
    if len({_form(weight) for weight in weights}) > 1:
        return "their weights are of several forms"
    if not isinstance(first, DenseWeight | Float8Weight | GroupedWeight) or first.dtype != torch.bfloat16:
        return "their rows are not in bfloat16"
    if any(isinstance(weight, GroupedWeight) and weight.order is not None for weight in weights):
        return "their inputs are in act-order"
    group = first.group_size if isinstance(first, GroupedWeight) else first.num_inputs
    return f"groups of {group} inputs, which are no multiple of {KEPT_GROUP}" if group % KEPT_GROUP else ""


def _form(weight: Weight) -> tuple[object, ...]:
    """Return what matrices in one tensor have in common."""
    if isinstance(weight, GroupedWeight):
        return code_of(weight), weight.group_size, weight.minima is None
    return (type(weight),)


class CodedWeight(LoadedWeight):
    """Implements `Weight`, of a rank whose weights are loaded: one matrix."""

    def __init__(self, weight: GroupedWeight) -> None:
        """`weight`: one without an `obstacle`; it is given up here."""
        taken = weight.take()
        self.num_outputs, self.num_inputs, self.dtype = taken.num_outputs, taken.num_inputs, taken.dtype
        minima = None if taken.minima is None else taken.minima.unsqueeze(0)
        self.codes = Codes(code_of(taken), taken.numbers.unsqueeze(0), taken.scales.unsqueeze(0), minima)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = product(x, self.codes)
        return y if bias is None else y.add_(bias)


def product(x: Tensor, codes: Codes, ends: Tensor | None = None, order: Tensor | None = None) -> Tensor:
    """Return [sorted rows, outputs] in bfloat16.

    x: [rows, inputs] bfloat16. `ends`: [m] int32, behind each matrix's last row, or None: there is one matrix. `order`:
    the row of x that each sorted row is, int64; None: x is sorted. Rows behind the last end have any results.
    """
    rows, row_scales = groups_to_float8(x, codes.group_size) if codes.rounds_rows else (x.contiguous(), None)
    per_matrix = len(x if order is None else order) / codes.num_matrices
    if (asked := _tile.get()) is not None:
        tile, asked.is_taken = asked.num_rows, True
    else:
        tile = next((size for size in TILES if per_matrix <= size), TILES[-1])
    parts = (codes.numbers, codes.scales, codes.minima, ends, order)
    return cast(Tensor, _product(rows, row_scales, int(codes.code), *parts, tile))


@torch.library.custom_op("kvferry::coded_product", mutates_args=())
def _product(
    x: Tensor,  # bfloat16, or 8-bit floats with scales
    row_scales: Tensor | None,  # [rows, groups] float32
    code: int,
    numbers: Tensor,
    scales: Tensor | None,
    minima: Tensor | None,
    ends: Tensor | None,
    order: Tensor | None,
    tile: int,
) -> Tensor:
    from .coded_kernel import multiply

    return multiply(x, row_scales, Codes(Code(code), numbers, scales, minima), ends, order, tile)
