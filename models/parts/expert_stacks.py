"""Experts that are stored in one tensor for all: what each has of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..families.experts import Stacks

Shape = tuple[int, ...]

# Stacks in 8-bit floats have scales for each expert: their names, and those that tensors of its own would have.
_SCALES = {"_scale_inv": "weight_scale_inv", "_activation_scale": "activation_scale"}


class StackPart(NamedTuple):
    """One expert's matrix, or a scale of it, is a part of a tensor that all experts are stored in."""

    name: str  # that a tensor of its own would have
    shape: Shape  # [out, in]; of a scale nothing
    expert: int  # its number
    start: int  # its first output in the stack
    is_transposed: bool


class StackedExperts(NamedTuple):
    """A layer's experts, as far as their stacks tell of them."""

    stacks: Stacks
    parts: Sequence[str]  # names of an expert's matrices, the one behind the activation last
    expert: Callable[[int], str]  # an expert's name in its layer
    inner_size: int
    hidden_size: int

    def parts_of(self, name: str, shape: Shape) -> list[StackPart]:
        """Return what the checkpoint has in the tensor `name` of such a shape; nothing: it is no stack.

        Qwen3-VL's are published as [experts, in, out], and saved again by transformers as [experts, out, in].
        """
        if scales := self._scales_of(name, shape):
            return scales
        if len(shape) != 3:
            return []
        *before, down = self.parts
        inner, is_down = self.inner_size, name.endswith(f".{self.stacks.down}")
        if not is_down and not name.endswith(f".{self.stacks.gate_up}"):
            return []
        hidden = self.hidden_size
        parts, num_outputs, num_inputs = ([down], hidden, inner) if is_down else (before, inner, hidden)
        layer, whole = name.removesuffix(self.stacks.down if is_down else self.stacks.gate_up), shape[1:]
        right = (len(parts) * num_outputs, num_inputs)
        if whole not in (right, right[::-1]):
            return []
        return [
            StackPart(f"{layer}{self.expert(i)}.{part}.weight", (num_outputs, num_inputs), i, start, whole != right)
            for i in range(shape[0])
            for part, start in zip(parts, (0, num_outputs), strict=False)
        ]

    def _scales_of(self, name: str, shape: Shape) -> list[StackPart]:
        """Return each matrix's scale; gate and up have one for both."""
        *before, down = self.parts
        for stack, parts in ((self.stacks.gate_up, before), (self.stacks.down, [down])):
            for suffix, own in _SCALES.items():
                if not name.endswith(f".{stack}{suffix}") or math.prod(shape) != shape[0]:
                    continue
                layer = name.removesuffix(f"{stack}{suffix}")
                each = [(i, f"{layer}{self.expert(i)}.{part}.{own}") for i in range(shape[0]) for part in parts]
                return [StackPart(own_name, (), i, 0, False) for i, own_name in each]
        return []
