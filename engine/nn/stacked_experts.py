"""Experts whose matrices stand in one tensor for all of them, with biases: those of gpt-oss, in MXFP4 too.

gate_up_proj [experts, in, 2 inner], gate and up in turns    down_proj [experts, inner, out]    and a bias of each
a block of MXFP4: 16 bytes, two numbers of e2m1 in each, low half first, and an exponent of 2 with 127 added
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...models.experts import ExpertsConfig
from .builder import Builder
from .layers import Linear
from .weight import DenseWeight, Leaf, WeightSlot

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class _StackedLinear(Linear):
    """One expert's linear: what fills it is the stack's."""

    def slots(self) -> Iterator[WeightSlot]:
        yield from ()


class StackedExpert:
    """An expert with a clamped activation; `GatedMLP`'s `partial` and `leaves` of it."""

    def __init__(self, gate_up: Linear, down: Linear, experts: ExpertsConfig) -> None:
        self.gate_up_proj, self.down_proj = gate_up, down
        self._alpha, self._limit = experts.alpha, experts.limit

    def partial(self, x: Tensor) -> Tensor:
        """Return this rank's part of the result."""
        gate_up = self.gate_up_proj(x).float()
        gate, up = gate_up[:, ::2].clamp(max=self._limit), gate_up[:, 1::2].clamp(-self._limit, self._limit)
        return self.down_proj((gate * torch.sigmoid(gate * self._alpha) * (up + 1)).to(x.dtype))

    def leaves(self) -> Iterator[Leaf]:
        yield from (self.gate_up_proj, self.down_proj)  # type: ignore[misc]  # both are `_StackedLinear`


class ExpertStack:
    """A rank's experts of a layer, and what fills them: a part of each, or `count` whole ones from `first` on."""

    def __init__(self, builder: Builder, name: str, experts: ExpertsConfig, *, first: int, count: int) -> None:
        self.name = name
        self._all, self._first = experts.num_experts, first
        self._hidden, self._inner = builder.config.hidden_size, experts.intermediate_size
        comm = builder.comm
        own = experts.intermediate_size // comm.size
        self._start = own * comm.rank
        self._whole = builder.whole_experts
        up, down = builder.empty(count, 2 * own, self._hidden), builder.empty(count, self._hidden, own)
        self._up_bias, self._down_bias = builder.empty(count, 2 * own), builder.empty(count, self._hidden)
        has_bias = comm.rank == 0  # of the sum over the ranks
        self.experts = [
            StackedExpert(
                _StackedLinear(f"{name}.gate_up_proj", DenseWeight(up[i]), self._up_bias[i]),
                _StackedLinear(f"{name}.down_proj", DenseWeight(down[i]), self._down_bias[i] if has_bias else None),
                experts,
            )
            for i in range(count)
        ]

    def slots(self) -> Iterator[WeightSlot]:
        """Yield what fills the stacks; called before the weights are packed alone."""
        up = _stack([expert.gate_up_proj for expert in self.experts])
        down = _stack([expert.down_proj for expert in self.experts])
        n, hidden, inner = self._all, self._hidden, self._inner
        split = (0, self._first)
        by_inner = split if self._whole else (2, 2 * self._start)
        yield WeightSlot(f"{self.name}.gate_up_proj", (n, hidden, 2 * inner), up.transpose(1, 2), *by_inner)
        by_inner = split if self._whole else (1, 2 * self._start)
        yield WeightSlot(f"{self.name}.gate_up_proj_bias", (n, 2 * inner), self._up_bias, *by_inner)
        by_inner = split if self._whole else (1, self._start)
        yield WeightSlot(f"{self.name}.down_proj", (n, inner, hidden), down.transpose(1, 2), *by_inner)
        yield WeightSlot(f"{self.name}.down_proj_bias", (n, hidden), self._down_bias, *split)


def _stack(linears: list[Linear]) -> Tensor:
    """Return the one tensor that these weights are parts of: nobody else keeps it when they are given up."""
    first = linears[0].weight
    assert isinstance(first, DenseWeight)
    shape = (len(linears), *first.plain.shape)
    return first.plain.as_strided(shape, (first.plain.numel(), first.plain.shape[1], 1))


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """[..., out, groups, 16] and [..., out, groups] uint8 -> [..., in, out] float32, exactly what they mean."""
    numbers = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    values = torch.ldexp(table[numbers.long()], scales.int().unsqueeze(-1) - 127)
    return values.flatten(-2).transpose(-1, -2)
