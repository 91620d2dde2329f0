"""A loaded model's packed matrices, by which its blocks are described (`described.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn.layers import Linear, RMSNorm
from ..weights.grouped import GroupedWeight
from ..weights.weight import DenseWeight
from .described import LinearParts
from .packing import Packed, Packer, address, two_apart


class Weights:
    """Matrices in C++'s form. It keeps the memory that descriptions point to."""

    def __init__(self, packer: Packer, dtype: torch.dtype) -> None:
        """`dtype`: the type of the library's elements."""
        self.keep: list[object] = []
        self.linears: list[tuple[Linear, LinearParts]] = []  # of the layers, with their descriptions
        self.of_experts: dict[int, LinearParts] = {}  # those of linears that are given some of a step's rows, by id
        self._pack, self._dtype = packer, dtype
        self._packed: dict[int, Packed] = {}  # by the weight's id

    def take(self, linear: Linear, weight: DenseWeight | GroupedWeight) -> None:
        """Pack a linear's matrix, which the weight is without from now on."""
        self.keep.append(weight)
        self._packed[id(weight)] = self._pack(weight, in_turns=linear.in_turns)

    def linear(self, linear: Linear, bias: Tensor | None) -> LinearParts:
        """Describe a linear that was taken, with a bias in place of its own."""
        if bias is not None:
            bias = two_apart(bias) if linear.in_turns else bias
            self.keep.append(bias := bias.to(self._dtype))  # a gate's is float32
        return LinearParts(self._packed[id(linear.weight)].tiles, address(bias))

    def place(self, target: LinearParts, linear: Linear, bias: Tensor | None) -> None:
        """Describe a linear in its field of a layer's description, where its adapters are told of later."""
        described = self.linear(linear, bias)
        target.weight, target.bias = described.weight, described.bias
        if linear.takes_some_rows:
            self.of_experts[id(linear)] = target
        else:
            self.linears.append((linear, target))

    def heads(self, matrices: Tensor) -> Packed:
        """Pack matrices [heads, outputs, inputs]: `Packer.heads`."""
        self.keep.append(packed := self._pack.heads(matrices))
        return packed

    def multiplied(self, norm: RMSNorm, factor: float) -> int | None:
        """Return the address of its weights, so that what it yields is multiplied."""
        self.keep.append(weight := ((norm.weight.float() + norm.offset) * factor - norm.offset).to(self._dtype))
        return address(weight)

    def ones(self, size: int) -> int | None:
        """Return the address of a norm's weights that has none."""
        self.keep.append(ones := torch.ones(size, dtype=self._dtype))
        return address(ones)


def weight_of(norm: RMSNorm | None) -> int | None:
    """Return the address of a norm's weights."""
    return None if norm is None else address(norm.weight)
