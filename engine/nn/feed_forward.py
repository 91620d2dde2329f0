"""A feed-forward is computed of each token by itself. Today's one kind is `GatedMLP`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from .builder import Builder
from .layers import ColumnParallelLinear, Part, RowParallelLinear
from .weight import Leaf


class FeedForward(Protocol):
    """A function of each token alone: it may be given any part of a step's tokens."""

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, hidden_size], normed -> [num_tokens, hidden_size], what is added to the residual stream."""
        ...

    def leaves(self) -> Iterator[Leaf]:
        """Yield all that holds weights."""
        ...


class GatedMLP:
    """Implements `FeedForward`: down(silu(gate(x)) * up(x))."""

    def __init__(self, builder: Builder, name: str) -> None:
        config = builder.config
        size, bias = config.intermediate_size, config.mlp_bias
        parts = (Part(f"{name}.gate_proj", size), Part(f"{name}.up_proj", size))
        self.gate_up_proj = ColumnParallelLinear(builder, f"{name}.gate_up_proj", config.hidden_size, parts, bias=bias)
        self.down_proj = RowParallelLinear(builder, f"{name}.down_proj", size, config.hidden_size, bias=bias)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, 1)
        activated = F.silu(gate.float()).mul_(up)  # in float32, rounded once
        return self.down_proj(activated.to(gate.dtype))

    def leaves(self) -> Iterator[Leaf]:
        yield from (self.gate_up_proj, self.down_proj)
