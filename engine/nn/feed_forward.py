"""A feed-forward is computed of each token by itself: `GatedMLP`, or many of them (`experts.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from ...models.config import Activation
from ..weights.weight import Leaf
from .builder import Builder
from .layers import ColumnParallelLinear, RowParallelLinear, column_parts

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class FeedForward(Protocol):
    """A function of each token alone: it may be given any part of a step's tokens."""

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, hidden_size], normed -> [num_tokens, hidden_size], what is added to the residual stream."""
        ...

    def leaves(self) -> Iterator[Leaf]:
        """Yield all that holds weights."""
        ...


class GatedMLP:
    """Implements `FeedForward`: down(activation(gate(x)) * up(x))."""

    def __init__(
        self,
        builder: Builder,
        name: str,
        size: int,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        *,
        fused: str | None = None,
    ) -> None:
        """`size`: inner columns, of all ranks. `names`: of the three matrices in the checkpoint, where it has no tensor
        `fused` of gate and up.
        """
        config = builder.config
        bias = config.mlp_bias
        gate, up, down = (f"{name}.{part}" for part in names)
        parts = column_parts([gate, up], [size, size], fused=None if fused is None else f"{name}.{fused}")
        self.is_silu = config.activation == "silu"
        self._activation = _ACTIVATIONS[config.activation]
        self.gate_up_proj = ColumnParallelLinear(builder, f"{name}.gate_up_proj", config.hidden_size, parts, bias=bias)
        self.down_proj = RowParallelLinear(builder, down, size, config.hidden_size, bias=bias)

    @property
    def num_inner(self) -> int:
        """Count this rank's inner columns."""
        return self.down_proj.weight.num_inputs

    def __call__(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activated(self.gate_up_proj(x)))

    def partial(self, x: Tensor) -> Tensor:
        """Return this rank's part of the result."""
        return self.down_proj.partial(self.activated(self.gate_up_proj(x)))

    def activated(self, gate_up: Tensor) -> Tensor:
        """[rows, 2 inner], gates before ups -> [rows, inner]."""
        gate, up = gate_up.chunk(2, 1)
        return self._activation(gate.float()).mul_(up).to(gate.dtype)  # in float32, rounded once

    def leaves(self) -> Iterator[Leaf]:
        yield from (self.gate_up_proj, self.down_proj)
