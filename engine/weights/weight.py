"""A weight: one matrix of a product, as its checkpoint stores it and as it is best multiplied by.

Which checkpoint tensors fill the matrix, how torch multiplies by it, and in which form it is kept for that are known to
its `Weight` alone. `Builder.weight` chooses the scheme: `DenseWeight`, the numbers themselves, `GroupedWeight`, or
`RoundedWeight`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# From this many rows on bfloat16 is multiplied in float32 by a processor that has no bfloat16 of its own: with fewer,
# reading a matrix costs more than multiplying by it (measured on a Zen 3: as fast at 6 rows, 2x at 16, 5x at 512).
_WIDENED_ROWS = 8
_WIDENED_SIZE = 2**19  # numbers of a matrix that are widened at once: what a core's cache holds as float32
PIECE_ROWS = 1024  # of a matrix that are widened or rounded at once: more take more memory beside the weights
# Code for a product of one shape takes half a megabyte, and half a millisecond to prepare. A server meets every number
# of rows: by their own bounds, 1,024 each, it was 600 MB after minutes. This is 32 numbers of rows of 8 shapes.
_MAX_PREPARED = 256
_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and of torch's way to it


@dataclass(slots=True, frozen=True)
class WeightSlot:
    """One rank's part of one checkpoint tensor: `target` = tensor.narrow(dim, start, target.shape[dim])."""

    name: str  # in the checkpoint
    shape: tuple[int, ...]  # in the checkpoint
    target: Tensor  # a view of this rank's parameter
    dim: int = 0
    start: int = 0
    rows: Rows | None = None  # what is filled where the matrix has a form of its own: `target` is its numbers
    scales: Tensor | None = None  # of MXFP4, whose numbers `target` [experts, out, in / 2] then is: of their groups


class StoredMatrix(Protocol):
    """A whole matrix in few bits, as a checkpoint has it."""

    numbers: Tensor
    scales: Tensor  # [outputs, groups of inputs]
    is_e4m3: bool  # numbers are 8-bit floats

    def narrow(self, dim: int, start: int, length: int) -> StoredMatrix:
        """Return a view of some outputs (`dim` 0) or inputs. Raises ConfigError where a group would be cut."""
        ...

    def dequantized(self) -> Tensor:
        """Return the plain matrix, [out, in] float32."""
        ...


class Rows(Protocol):
    """Some rows of a `Weight` that is no plain matrix."""

    def put(self, matrix: Tensor | StoredMatrix, dim: int, start: int) -> None:
        """Take this rank's part of a whole matrix, from `start` in `dim`; it is in this form, or can be brought to it.

        Raises ConfigError where ranks cannot share it so.
        """
        ...


class Leaf(Protocol):
    """A holder of checkpoint tensors: a linear, a norm, an embedding."""

    def slots(self) -> Iterator[WeightSlot]: ...


class Weight(Protocol):
    """W [num_outputs, num_inputs] of y = x W^T."""

    num_outputs: int
    num_inputs: int
    dtype: torch.dtype  # of the rows that it is multiplied by

    def slots(
        self, name: str, shape: tuple[int, int], *, rows: slice = slice(None), dim: int = 0, start: int = 0
    ) -> Iterator[WeightSlot]:
        """Yield what fills `rows` of the matrix: the checkpoint's matrix `name` of `shape`, from `start` on in `dim`.

        Before `pack` alone.
        """
        ...

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[num_tokens, num_inputs] -> [num_tokens, num_outputs]."""
        ...

    def pack(self) -> None:
        """Trade the loaded matrix for the form in which torch multiplies by it fastest on a CPU."""
        ...


class LoadedWeight:
    """A part of a `Weight` that is made of a loaded one, in the form in which it is multiplied by."""

    def slots(
        self, name: str, shape: tuple[int, int], *, rows: slice = slice(None), dim: int = 0, start: int = 0
    ) -> Iterator[WeightSlot]:
        raise AssertionError("it is made of a loaded weight")

    def pack(self) -> None:
        """Do nothing: a weight is packed when it is made."""


class DenseWeight:
    """Implements `Weight`: plain numbers. After `pack` only oneDNN's form of them is left, where it is faster; after
    `take` nothing.
    """

    def __init__(self, plain: Tensor) -> None:
        self.plain = plain
        self.num_outputs, self.num_inputs = plain.shape
        self.dtype = plain.dtype
        self._blocked: Tensor | None = None
        self._is_widened = False  # for many rows

    def slots(
        self, name: str, shape: tuple[int, int], *, rows: slice = slice(None), dim: int = 0, start: int = 0
    ) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{name}.weight", shape, self.plain[rows], dim, start)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._blocked is not None:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._blocked, bias, "none", [], "")
            return y
        if self._is_widened and len(x) >= _WIDENED_ROWS:
            return _widened_product(x, self.plain, bias)
        return F.linear(x, self.plain, bias)

    def pack(self) -> None:
        if self._blocked is not None or self.plain.device.type != "cpu":
            return
        if _can_block(self.dtype):
            self._blocked = torch.ops.mkldnn._reorder_linear_weight(self.plain)
            self.take()
        else:
            self._is_widened = self.dtype == torch.bfloat16 and is_slow_in_bfloat16()

    def take(self) -> Tensor:
        """Give the plain matrix up to the caller, who has a form of its own for it."""
        plain, self.plain = self.plain, torch.empty(0, dtype=self.dtype)
        return plain


def _can_block(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN's linear exists in this build, and this processor has its bfloat16."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def limit_prepared_products() -> None:
    """Bound how many products oneDNN, and torch before it, keep prepared. Before the first one: both ask once."""
    for name in _CAPACITIES:
        os.environ.setdefault(name, str(_MAX_PREPARED))


def is_slow_in_bfloat16() -> bool:
    """Tell whether this processor, having no bfloat16 of its own, multiplies many rows of it slower than of float32."""
    return platform.machine() in ("x86_64", "AMD64") and not _can_block(torch.bfloat16)


def _widened_product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply in float32 what is stored as bfloat16, a part of the outputs at a time, and round what comes out."""
    wide = x.float()
    y = x.new_empty(len(x), len(matrix))
    step = max(1, _WIDENED_SIZE // matrix.shape[1])
    for start in range(0, len(matrix), step):
        part = slice(start, start + step)
        y[:, part] = F.linear(wide, matrix[part].float(), None if bias is None else bias[part].float())
    return y
