"""A feed-forward is computed of each token by itself: an `MLP`, gated or plain, or many of them (`experts.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from ...models.parts.activation import Activation
from ..weights.weight import Leaf
from .builder import Builder
from .layers import ColumnParallelLinear, RowParallelLinear, column_parts

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, "Primer", section 4.1
}


class FeedForward(Protocol):
    """A function of each token alone: it may be given any part of a step's tokens."""

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, hidden_size], normed -> [num_tokens, hidden_size], what is added to the residual stream."""
        ...

    def leaves(self) -> Iterator[Leaf]:
        """Yield all that holds weights."""
        ...


class MLP(ABC):
    """Implements `FeedForward`: down(activated(what goes before))."""

    def __init__(
        self,
        builder: Builder,
        name: str,
        size: int,
        names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
        *,
        fused: str | None = None,
        row_size: int | None = None,
    ) -> None:
        """`size`: inner columns, of all ranks. `names`: of the matrices in the checkpoint, the one behind the
        activation last; those before it, where it has no tensor `fused` of them. `row_size`: numbers of a token; None:
        the residual stream's.
        """
        config = builder.config
        bias, row_size = config.mlp_bias, row_size or config.hidden_size
        *before, down = (f"{name}.{part}" for part in names)
        parts = column_parts(before, [size] * len(before), fused=None if fused is None else f"{name}.{fused}")
        self._activation = ACTIVATIONS[config.activation]
        self._gate_multiplier = config.multipliers.gate
        # Of one without a gate: up alone.
        self.gate_up_proj = ColumnParallelLinear(builder, f"{name}.gate_up_proj", row_size, parts, bias=bias)
        self.down_proj = RowParallelLinear(builder, down, size, row_size, bias=bias)

    @property
    def num_inner(self) -> int:
        """Count this rank's inner columns."""
        return self.down_proj.weight.num_inputs

    def __call__(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activated(self.gate_up_proj(x)))

    def partial(self, x: Tensor) -> Tensor:
        """Return this rank's part of the result."""
        return self.down_proj.partial(self.activated(self.gate_up_proj(x)))

    @abstractmethod
    def activated(self, gate_up: Tensor) -> Tensor:
        """Return [rows, inner] of what `gate_up_proj` yields."""

    def leaves(self) -> Iterator[Leaf]:
        yield from (self.gate_up_proj, self.down_proj)


class GatedMLP(MLP):
    """down(activation(gate(x)) * up(x))."""

    @property
    def is_silu(self) -> bool:
        return self._activation is F.silu

    def activated(self, gate_up: Tensor) -> Tensor:
        """[rows, 2 inner], gates before ups -> [rows, inner]."""
        gate, up = gate_up.chunk(2, 1)
        wide = gate.float() if self._gate_multiplier == 1.0 else gate.float() * self._gate_multiplier
        return self._activation(wide).mul_(up).to(gate.dtype)  # in float32, rounded once


class PlainMLP(MLP):
    """down(activation(up(x)))."""

    def activated(self, gate_up: Tensor) -> Tensor:
        return self._activation(gate_up.float()).to(gate_up.dtype)


def make_mlp(
    builder: Builder,
    name: str,
    size: int,
    names: Sequence[str],
    *,
    fused: str | None = None,
    row_size: int | None = None,
) -> MLP:
    """Make the MLP of so many matrices: of three it has a gate."""
    make = PlainMLP if len(names) == 2 else GatedMLP
    return make(builder, name, size, names, fused=fused, row_size=row_size)
