"""Convolutions over the last few tokens of each row of a step, whose earlier tokens' rows are kept in states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.parts.short_convolutions import ShortConvolutionsConfig
from ...models.parts.states import RowPart
from ..weights.weight import Leaf, WeightSlot
from .builder import Builder
from .layers import ColumnParallelLinear, RowParallelLinear, parts_of, shares_of
from .mixer import StatefulMixer
from .rotary import Rope
from .states import LayerStates


@dataclass(slots=True, frozen=True)
class StepPart:
    """Tokens of a step that go through a layer at once: one of each of some rows, or some of one row."""

    tokens: Tensor | slice  # in the packed line
    convolved: Tensor  # [num_tokens, num_convolved] float32
    memory: Tensor  # [rows, *memory_shape] float32; whoever takes the part updates it in place
    is_stretch: bool  # of one row, tokens that follow each other


class Convolution:
    """Implements `Leaf`: a layer's convolution of each number by itself, in float32."""

    def __init__(self, builder: Builder, name: str, states: LayerStates, index: int, *, has_bias: bool) -> None:
        """`index`: of the layer, among those with states."""
        config, whole = states.config, builder.config.states
        assert whole is not None
        self.config, self._states, self.index = config, states, index
        shape = (config.num_convolved, 1, config.kernel_size)
        self.name = name
        self._shares = shares_of(parts_of(name, whole.row_parts), builder.comm)
        self.weight = torch.empty(shape, dtype=torch.float32, device=builder.device)
        self.bias = torch.empty(shape[0], dtype=torch.float32, device=builder.device) if has_bias else None

    def parts(self, rows: Tensor) -> Iterator[StepPart]:
        """Convolve a step's rows [num_tokens, num_convolved], with those of the tokens before them.

        What a part's memory holds when the next part is asked for is kept. Raises ForeignStateError where the states'
        `judge` does.
        """
        states, index = self._states, self.index
        for singles in states.singles:
            inputs, memory, known = states.read(index, singles.sources, singles.starts)
            inputs = torch.cat((inputs, rows[singles.tokens].float().unsqueeze(1)), 1)  # [n, kernel_size, ...]
            convolved = (inputs * self.weight.squeeze(1).T).sum(1)
            convolved = convolved if self.bias is None else convolved + self.bias
            yield StepPart(singles.tokens, convolved, memory, is_stretch=False)
            states.write(index, singles.targets, known + 1, inputs[:, 1:], memory)
        for stretch in states.stretches:
            # Blocks are named by slices, for which a GPU waits for no index.
            tokens, source, target = stretch.tokens, stretch.source, stretch.target
            start = torch.full((1,), stretch.start, device=rows.device)
            inputs, memory, known = states.read(index, slice(source, source + 1), start)
            inputs = torch.cat((inputs[0], rows[tokens].float()))  # [kernel_size - 1 + n, num_convolved]
            yield StepPart(tokens, self._convolved(inputs), memory, is_stretch=True)
            kept = inputs[len(inputs) - self.weight.shape[2] + 1 :].unsqueeze(0)
            states.write(index, slice(target, target + 1), known + (stretch.end - stretch.first), kept, memory)

    def _convolved(self, inputs: Tensor) -> Tensor:
        """[kernel_size - 1 + n, num_convolved] -> [n, num_convolved]. Products of float32 on any device, where a GPU's
        library of convolutions may round to fewer bits.
        """
        first, *others = self.weight.squeeze(1).T
        count = len(inputs) - len(others)
        convolved: Tensor = inputs[:count] * first
        for shift, factors in enumerate(others, 1):
            convolved.addcmul_(inputs[shift : shift + count], factors)
        return convolved if self.bias is None else convolved.add_(self.bias)

    def slots(self) -> Iterator[WeightSlot]:
        for share in self._shares:
            shape, own = (share.stored, *self.weight.shape[1:]), self.weight[share.rows]
            yield WeightSlot(f"{self.name}.weight", shape, own, 0, share.start)
            if self.bias is not None:
                yield WeightSlot(f"{self.name}.bias", shape[:1], self.bias[share.rows], 0, share.start)


class Vectors:
    """Implements `Leaf`: weights of a layer that are no matrices, in float32; each rank has an even part of them."""

    def __init__(self, builder: Builder, name: str, sizes: Mapping[str, int]) -> None:
        """`sizes`: of the whole model."""
        self.name, self._comm = name, builder.comm
        self.by_name = {
            part: torch.empty(size // self._comm.size, dtype=torch.float32, device=builder.device)
            for part, size in sizes.items()
        }

    def slots(self) -> Iterator[WeightSlot]:
        for part, tensor in self.by_name.items():
            size = len(tensor)
            yield WeightSlot(f"{self.name}.{part}", (size * self._comm.size,), tensor, 0, size * self._comm.rank)


def left_of(since: Tensor) -> Tensor:
    """[..., n] decays' logarithms from a chunk's beginning on -> [..., n, n]: of what token j wrote, what is left when
    token i reads; nothing of what is written later.
    """
    later = torch.ones(since.shape[-1], since.shape[-1], dtype=torch.bool, device=since.device).triu(1)
    return (since.unsqueeze(-1) - since.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()


class ShortConvolution(StatefulMixer):
    """c * convolution(b * x), all three of a token (Liquid AI 2025, "LFM2 Technical Report")."""

    def __init__(self, builder: Builder, name: str, index: int, states: LayerStates) -> None:
        """`index`: among the layers with states."""
        config, hidden = states.config, builder.config.hidden_size
        assert isinstance(config, ShortConvolutionsConfig)
        self.states, has_bias = states, config.has_bias
        parts = parts_of(f"{name}.in_proj", [RowPart(hidden)] * 3)
        self.in_proj = ColumnParallelLinear(builder, f"{name}.in_proj", hidden, parts, bias=has_bias)
        self.convolution = Convolution(builder, f"{name}.conv", states, index, has_bias=has_bias)
        self.out_proj = RowParallelLinear(builder, f"{name}.out_proj", hidden, hidden, bias=has_bias)

    @property
    def num_projected(self) -> int:
        return self.in_proj.weight.num_outputs

    def project(self, x: Tensor, rope: Rope) -> Tensor:
        """Return b, c and x, [num_tokens, 3 * this rank's columns]."""
        return self.in_proj(x)

    def read(self, projected: Tensor) -> Tensor:
        """Return [num_tokens, this rank's columns]; zeros of tokens that are padding."""
        b, c, x = projected[: self.states.num_tokens].float().chunk(3, 1)
        said = torch.zeros_like(projected[:, : c.shape[1]])
        for part in self.convolution.parts(b * x):
            said[part.tokens] = (c[part.tokens] * part.convolved).to(said.dtype)
        return said

    def leaves(self) -> Iterator[Leaf]:
        yield from (self.in_proj, self.convolution, self.out_proj)
