"""Experts that are stored in one tensor for all: what each has of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ...common.errors import ConfigError
from ..families.experts import Stacks

Shape = tuple[int, ...]
Block = tuple[int, int]  # outputs and inputs that share a scale

# Stacks in 8-bit floats have scales for each expert: their names, and those that tensors of its own would have.
_SCALES = {"_scale_inv": "weight_scale_inv", "_activation_scale": "activation_scale"}


class StackPart(NamedTuple):
    """One expert's matrix, or a scale of it, is a part of a tensor that all experts are stored in."""

    name: str  # that a tensor of its own would have
    shape: Shape  # [out, in], in blocks of a scale's; of a scale for all nothing
    expert: int  # its number
    start: int  # its first output in the stack, or block of outputs
    is_transposed: bool


class _Matrices(NamedTuple):
    """An expert's matrices that stand in one tensor, one behind the other: gate and up, or down."""

    layer: str  # with the dot behind
    parts: Sequence[str]  # their names
    num_outputs: int  # of each
    num_inputs: int

    @property
    def whole(self) -> Shape:
        return (len(self.parts) * self.num_outputs, self.num_inputs)


class StackedExperts(NamedTuple):
    """A layer's experts, as far as their stacks tell of them."""

    stacks: Stacks
    parts: Sequence[str]  # names of an expert's matrices, the one behind the activation last
    expert: Callable[[int], str]  # an expert's name in its layer
    inner_size: int
    hidden_size: int
    block_of: Callable[[str], Block | None]  # of a module's scales; None: they are not of blocks

    def parts_in(self, shapes: Mapping[str, Shape]) -> dict[str, list[StackPart]]:
        """Return what each expert has of those tensors that are stacks, or scales of some.

        Qwen3-VL's are published as [experts, in, out], and saved again by transformers as [experts, out, in]; blocks of
        scales stand as the numbers do. Raises ConfigError where a block is of two matrices.
        """
        found: dict[str, list[StackPart]] = {}
        for name, shape in shapes.items():
            if (matrices := self._matrices(name)) is not None:
                found[name] = self._numbers(matrices, shape)
                continue
            for suffix, own in _SCALES.items():
                stack = name.removesuffix(suffix)
                if stack != name and (matrices := self._matrices(stack)) is not None:
                    found[name] = self._scales(name, matrices, shape, shapes.get(stack, ()), own)
        return {name: parts for name, parts in found.items() if parts}

    def _matrices(self, stack: str) -> _Matrices | None:
        """Return what a tensor of that name holds of each expert; None: it is no stack."""
        *before, down = self.parts
        if stack.endswith(f".{self.stacks.down}"):
            return _Matrices(stack.removesuffix(self.stacks.down), [down], self.hidden_size, self.inner_size)
        if stack.endswith(f".{self.stacks.gate_up}"):
            return _Matrices(stack.removesuffix(self.stacks.gate_up), before, self.inner_size, self.hidden_size)
        return None

    def _numbers(self, matrices: _Matrices, shape: Shape) -> list[StackPart]:
        whole, (num_outputs, num_inputs) = shape[1:], matrices[2:]
        if whole not in (matrices.whole, matrices.whole[::-1]):
            return []
        return self._each(matrices, "weight", shape[0], (num_outputs, num_inputs), whole != matrices.whole)

    def _scales(self, name: str, matrices: _Matrices, shape: Shape, numbers: Shape, own: str) -> list[StackPart]:
        """Return each matrix's scale, where gate and up have one for both, or its blocks' scales."""
        first = f"{matrices.layer}{self.expert(0)}.{matrices.parts[0]}"
        block = self.block_of(first) if own == "weight_scale_inv" else None
        if block is None:
            return self._each(matrices, own, shape[0], (), False) if shape and math.prod(shape) == shape[0] else []
        num_parts = len(matrices.parts)
        if num_parts > 1 and matrices.num_outputs % block[0]:
            raise ConfigError(
                f"{name}: a block of {block[0]} outputs is of two matrices: each has {matrices.num_outputs}"
            )
        own_shape = (-(-matrices.num_outputs // block[0]), -(-matrices.num_inputs // block[1]))
        whole, is_transposed = (num_parts * own_shape[0], own_shape[1]), numbers[1:] != matrices.whole
        if shape[1:] != (whole[::-1] if is_transposed else whole):
            return []
        return self._each(matrices, own, shape[0], own_shape, is_transposed)

    def _each(
        self, matrices: _Matrices, own: str, num_experts: int, shape: Shape, is_transposed: bool
    ) -> list[StackPart]:
        starts = [index * shape[0] if shape else 0 for index in range(len(matrices.parts))]
        return [
            StackPart(f"{matrices.layer}{self.expert(i)}.{part}.{own}", shape, i, start, is_transposed)
            for i in range(num_experts)
            for part, start in zip(matrices.parts, starts, strict=True)
        ]
