"""A weight: one matrix of a product, as its checkpoint stores it and as it is best multiplied by.

Which checkpoint tensors fill the matrix, how torch multiplies by it, and in which form it is kept for that are known to
its `Weight` alone. `Builder.weight` chooses the scheme. Today's one is `DenseWeight`, the numbers themselves.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN reads this once, before its first product. With AMX it would block weights in a way that native code cannot
# read, and the same steps in torch take several times as long.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


@dataclass(slots=True, frozen=True)
class WeightSlot:
    """One rank's part of one checkpoint tensor: `target` = tensor.narrow(dim, start, target.shape[dim])."""

    name: str  # in the checkpoint
    shape: tuple[int, ...]  # in the checkpoint
    target: Tensor  # a view of this rank's parameter
    dim: int = 0
    start: int = 0


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


class DenseWeight:
    """Implements `Weight`: a matrix of plain numbers. After `pack`, oneDNN's blocked form of it is all that is left."""

    def __init__(self, plain: Tensor) -> None:
        self.plain = plain
        self.num_outputs, self.num_inputs = plain.shape
        self.dtype = plain.dtype
        self.tiles: int | None = None  # where the packed form lies, if it is one that native code can read
        self._blocked: Tensor | None = None

    def slots(
        self, name: str, shape: tuple[int, int], *, rows: slice = slice(None), dim: int = 0, start: int = 0
    ) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{name}.weight", shape, self.plain[rows], dim, start)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._blocked is None:
            return F.linear(x, self.plain, bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._blocked, bias, "none", [], "")
        return y

    def pack(self) -> None:
        if self._blocked is None and self.plain.device.type == "cpu" and _can_block(self.dtype):
            self._blocked = torch.ops.mkldnn._reorder_linear_weight(self.plain)
            self.tiles = _address_of_tiles(self._blocked, self.plain)
            self.plain = torch.empty(0, dtype=self.dtype)


def _can_block(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN's linear exists in this build, and this processor has its bfloat16."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _address_of_tiles(packed: Tensor, weight: Tensor) -> int | None:
    """Return the address of `packed` if it is [out / 64, in / 2, 64, 2] in bfloat16, padded with zeros, as where
    processors multiply pairs of bfloat16. oneDNN chooses and does not tell: the first and the last tile are compared.
    """
    columns, inputs = weight.shape
    shape = (-(-columns // 64), -(-inputs // 32) * 16, 64, 2)
    num_bytes: int = torch.ops.mkldnn._nbytes(packed)
    if weight.dtype != torch.bfloat16 or num_bytes != math.prod(shape) * 2:
        return None
    address: int = torch.ops.mkldnn.data_ptr(packed)
    memory = (ctypes.c_char * num_bytes).from_address(address)
    tiles = torch.frombuffer(memory, dtype=torch.bfloat16).view(shape)
    for index in (0, shape[0] - 1):
        expected = torch.zeros(64, shape[1] * 2, dtype=torch.bfloat16)
        part = weight[64 * index : 64 * (index + 1)]
        expected[: len(part), :inputs] = part
        if not torch.equal(tiles[index], expected.view(64, shape[1], 2).transpose(0, 1)):
            return None
    return address
