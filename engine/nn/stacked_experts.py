"""Experts whose matrices stand in one tensor for all of them, with biases: those of gpt-oss, in MXFP4 too.

gate_up_proj [experts, in, 2 inner], gate and up in turns    down_proj [experts, inner, out]    and a bias of each
a block of MXFP4: 16 bytes, two numbers of e2m1 in each, low half first, and an exponent of 2 with 127 added

Where numbers of MXFP4 are multiplied by as they are, they stay so: in C++, and on cards in bfloat16. On a card that
multiplies by many matrices in 8-bit floats at once they become such, if asked to (`--quantization fp8`), with a power
of 2 as the scale of each output. Elsewhere they are widened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...models.parts.experts import ExpertsConfig
from ...models.storage import MXFP4_GROUP
from ..weights.float8 import RoundedWeight, groups_products, takes
from ..weights.grouped import GroupedWeight, e2m1, has_coded_products, power_of_2
from ..weights.weight import DenseWeight, Leaf, Weight, WeightSlot
from .builder import Builder
from .layers import Linear


class _StackedLinear(Linear):
    """One expert's linear: what fills it is the stack's."""

    def __init__(self, name: str, weight: Weight, bias: Tensor | None, *, in_turns: bool) -> None:
        super().__init__(name, weight, bias)
        self.in_turns = in_turns

    def slots(self) -> Iterator[WeightSlot]:
        yield from ()


class StackedExpert:
    """An expert with a clamped activation; `MLP`'s `partial` and `leaves` of it."""

    def __init__(self, gate_up: Linear, down: Linear, experts: ExpertsConfig) -> None:
        self.gate_up_proj, self.down_proj = gate_up, down
        self._alpha, self._limit = experts.alpha, experts.limit

    @property
    def num_inner(self) -> int:
        """Count this rank's inner columns."""
        return self.down_proj.weight.num_inputs

    def partial(self, x: Tensor) -> Tensor:
        """Return this rank's part of the result."""
        return self.down_proj(self.activated(self.gate_up_proj(x)))

    def activated(self, gate_up: Tensor) -> Tensor:
        """[rows, 2 inner], gate and up in turns -> [rows, inner]."""
        gate, up = gate_up[:, ::2].float(), gate_up[:, 1::2].float()
        gate, up = gate.clamp(max=self._limit), up.clamp(-self._limit, self._limit)
        return (gate * torch.sigmoid(gate * self._alpha) * (up + 1)).to(gate_up.dtype)

    def leaves(self) -> Iterator[Leaf]:
        yield from (self.gate_up_proj, self.down_proj)  # type: ignore[misc]  # both are `_StackedLinear`


class ExpertStack:
    """A rank's experts of a layer, and what fills them: a part of each, or `held` ones, whole."""

    def __init__(
        self, builder: Builder, name: str, experts: ExpertsConfig, held: tuple[int, ...], *, are_whole: bool
    ) -> None:
        self.name = name
        self._all, self._held, count = experts.num_experts, held, len(held)
        self._hidden, self._inner = builder.config.hidden_size, experts.intermediate_size
        comm = builder.comm
        own = experts.intermediate_size // comm.size
        self._start = own * comm.rank
        self._whole = are_whole
        make = _maker(builder, own)
        up, down = make(builder, count, 2 * own, self._hidden), make(builder, count, self._hidden, own)
        self._up_bias, self._down_bias = builder.empty(count, 2 * own), builder.empty(count, self._hidden)
        has_bias = comm.rank == 0  # of the sum over the ranks
        self.experts = [
            StackedExpert(
                _StackedLinear(f"{name}.gate_up_proj", up[i], self._up_bias[i], in_turns=True),
                _StackedLinear(f"{name}.down_proj", down[i], self._down_bias[i] if has_bias else None, in_turns=False),
                experts,
            )
            for i in range(count)
        ]

    @staticmethod
    def _slot(weights: list[Weight]) -> Callable[..., WeightSlot]:
        """Return what makes the slot of a stack, of its name and shape in the checkpoint and where a part begins."""
        first, count = weights[0], len(weights)
        if isinstance(first, GroupedWeight | RoundedWeight):
            numbers, scales = _stack(first.numbers, count), _stack(first.scales, count)
            return lambda name, shape, dim, start: WeightSlot(name, shape, numbers, dim, start, scales=scales)
        assert isinstance(first, DenseWeight)
        target = _stack(first.plain, count).transpose(1, 2)
        return lambda name, shape, dim, start: WeightSlot(name, shape, target, dim, start)

    def slots(self) -> Iterator[WeightSlot]:
        """Yield what fills the stacks; called before the weights are packed alone."""
        n, hidden, inner = self._all, self._hidden, self._inner
        for run, first in self._runs():
            up = self._slot([expert.gate_up_proj.weight for expert in self.experts[run]])
            down = self._slot([expert.down_proj.weight for expert in self.experts[run]])
            split = (0, first)
            by_inner = split if self._whole else (2, 2 * self._start)
            yield up(f"{self.name}.gate_up_proj", (n, hidden, 2 * inner), *by_inner)
            by_inner = split if self._whole else (1, 2 * self._start)
            yield WeightSlot(f"{self.name}.gate_up_proj_bias", (n, 2 * inner), self._up_bias[run], *by_inner)
            by_inner = split if self._whole else (1, self._start)
            yield down(f"{self.name}.down_proj", (n, inner, hidden), *by_inner)
            yield WeightSlot(f"{self.name}.down_proj_bias", (n, hidden), self._down_bias[run], *split)

    def _runs(self) -> Iterator[tuple[slice, int]]:
        """Yield each run of neighbours: where it stands here, and the number of its first expert."""
        held = self._held
        starts = [i for i in range(len(held)) if i == 0 or held[i] != held[i - 1] + 1]
        for start, stop in zip(starts, [*starts[1:], len(held)], strict=True):
            yield slice(start, stop), held[start]


Make = Callable[[Builder, int, int, int], list[Weight]]  # of so many matrices, of outputs and inputs


def _maker(builder: Builder, own: int) -> Make:
    """Choose what the experts' numbers are kept as. `own`: a rank's inner columns."""
    quantization, hidden = builder.config.quantization, builder.config.hidden_size
    if quantization is None or not quantization.has_mxfp4_experts or builder.dtype != torch.bfloat16:
        return _plain_weights
    are_taken = takes(2 * own, hidden, builder.dtype) and takes(hidden, own, builder.dtype)
    if are_taken and quantization.rounds_experts_of_mxfp4 and groups_products(builder.device):
        return _float8_weights
    stay = builder.device.type == "cpu" or has_coded_products(builder.device)
    return _mxfp4_weights if stay and own % MXFP4_GROUP == 0 else _plain_weights  # by whole groups


def _plain_weights(builder: Builder, count: int, num_outputs: int, num_inputs: int) -> list[Weight]:
    return [DenseWeight(matrix) for matrix in builder.empty(count, num_outputs, num_inputs)]


def _mxfp4_weights(builder: Builder, count: int, num_outputs: int, num_inputs: int) -> list[Weight]:
    device = builder.device
    numbers = torch.empty(count, num_outputs, num_inputs // 2, dtype=torch.uint8, device=device)
    kind = torch.float32 if device.type == "cpu" else torch.uint8  # C++ has shorter ones itself once they are loaded
    scales = torch.empty(count, num_outputs, num_inputs // MXFP4_GROUP, dtype=kind, device=device)
    return [
        GroupedWeight(own, of_groups, dtype=builder.dtype, is_e2m1=True)
        for own, of_groups in zip(numbers, scales, strict=True)
    ]


def _float8_weights(builder: Builder, count: int, num_outputs: int, num_inputs: int) -> list[Weight]:
    numbers = torch.zeros(count, num_outputs, num_inputs, dtype=torch.float8_e4m3fn, device=builder.device)
    scales = torch.ones(count, num_outputs, 1, device=builder.device)
    return [RoundedWeight(*parts, builder.dtype) for parts in zip(numbers, scales, strict=True)]


def _stack(first: Tensor, count: int) -> Tensor:
    """Return the one tensor that the first matrix is a part of: nobody else keeps it when they are given up."""
    return first.as_strided((count, *first.shape), (first.numel(), first.shape[1], 1))


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """[..., out, groups, 16] and [..., out, groups] uint8 -> [..., in, out] float32, exactly what they mean."""
    numbers = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    values = e2m1(numbers) * power_of_2(scales).unsqueeze(-1)
    return values.flatten(-2).transpose(-1, -2)


def mxfp4_as_float8(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """[out, groups, 16] and [out, groups] uint8 -> 8-bit floats [out, in], and each output's scale, [out, 1] float32.

    The largest group of an output reaches 384 at most. A number is kept exactly where its group's exponent is up to 12
    below that one's, and rounded to multiples of 2^-9 elsewhere.
    """
    scale = power_of_2(scales.amax(1, keepdim=True)).mul_(2.0**-6).clamp_(min=torch.finfo(torch.float32).tiny)
    return (unpack_mxfp4(blocks, scales).T / scale).to(torch.float8_e4m3fn), scale


def part_of_mxfp4(tensor: Tensor, dim: int, start: int, target: Tensor) -> Tensor:
    """Return a rank's part of an expert's blocks or scales, [out, groups, ...]; `dim` is the plain stack's."""
    if dim == 0:
        return tensor
    if dim == 2:
        return tensor.narrow(0, start, target.shape[0])
    return tensor.narrow(1, start // MXFP4_GROUP, target.shape[1] * 2 // MXFP4_GROUP)
