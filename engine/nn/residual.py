"""Some families do more to the residual stream of a layer than to add its blocks' results.

    beside the MLP       experts, each with a norm behind it, before both are added
    behind both blocks   a gate of it times the layer's own input of the token, projected, normed and added
    behind that          all of it times a number

Each rank has the whole stream, and a part of the matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.parts.experts import NORMS_BESIDE_MLP
from ...models.parts.uneven_heads import LayerInputs
from ..ranks.communicator import Communicator
from ..weights.weight import Leaf, WeightSlot
from .builder import Builder
from .experts import SparseMLP
from .feed_forward import ACTIVATIONS
from .layers import ColumnParallelLinear, ParallelEmbedding, Part, RMSNorm, RowParallelLinear


class LayerFactor:
    """A number multiplies the residual stream behind a layer."""

    def __init__(self, builder: Builder, name: str) -> None:
        self.name = name
        self.weight = builder.empty(1)

    def slots(self) -> Iterator[WeightSlot]:
        yield WeightSlot(self.name, (1,), self.weight)


class ExpertsBeside:
    """Adds what a layer's experts yield, which see the residual stream by a norm of their own, to what its MLP does."""

    def __init__(self, builder: Builder, layer: str, sparse: SparseMLP) -> None:
        _, *behind = (f"{layer}.{name}" for name in NORMS_BESIDE_MLP)
        self.sparse = sparse
        self.mlp_norm, self.norm = (RMSNorm(builder, name, builder.config.hidden_size) for name in behind)

    def __call__(self, fed: Tensor, x: Tensor) -> Tensor:
        """[num_tokens, hidden_size], what the MLP yields, and the residual stream that it was made of -> their sum."""
        rows = F.rms_norm(x.float(), x.shape[1:], eps=self.norm.eps).to(fed.dtype)
        return self.mlp_norm(fed) + self.norm(self.sparse(rows))

    def leaves(self) -> Iterator[Leaf]:
        yield from self.sparse.leaves()
        yield from (self.mlp_norm, self.norm)


class InputTable:
    """Makes each layer's own input of a token, all of it on every rank."""

    def __init__(self, builder: Builder, inputs: LayerInputs) -> None:
        config, self.size = builder.config, inputs.size
        width, self._num_layers = config.num_layers * inputs.size, config.num_layers
        self.table = ParallelEmbedding(builder, "model.embed_tokens_per_layer", (inputs.vocab_size, width))
        whole, name = replace(builder, comm=Communicator()), "model.per_layer_model_projection"
        self.projection = ColumnParallelLinear(whole, name, config.hidden_size, [Part(name, width)], bias=False)
        self.norm = RMSNorm(builder, "model.per_layer_projection_norm", inputs.size)
        # As the reference implementation has it: rounded to the weights' type.
        self.multiplier = float(torch.tensor(math.sqrt(inputs.size), dtype=builder.dtype))
        self.made_multiplier = config.hidden_size**-0.5

    def __call__(self, input_ids: Tensor, x: Tensor) -> Tensor:
        """[num_tokens] and the residual stream as it begins -> [num_tokens, num_layers, size] float32."""
        shape = len(input_ids), self._num_layers, self.size
        made = self.projection(x.to(self.norm.weight.dtype)).float().mul_(self.made_multiplier)
        looked_up = self.table(input_ids).float().mul_(self.multiplier)
        return self.norm(made.view(shape)).float().add_(looked_up.view(shape)).mul_(math.sqrt(0.5))

    def leaves(self) -> Iterator[Leaf]:
        yield from (self.table, self.projection, self.norm)


class OwnInput:
    """Adds what a layer makes of its own input of a token. Ranks share the input's numbers."""

    def __init__(self, builder: Builder, layer: str, inputs: LayerInputs) -> None:
        config, comm, name = builder.config, builder.comm, f"{layer}.per_layer_input_gate"
        self.gate = ColumnParallelLinear(builder, name, config.hidden_size, [Part(name, inputs.size)], bias=False)
        self.projection = RowParallelLinear(
            builder, f"{layer}.per_layer_projection", inputs.size, config.hidden_size, bias=False
        )
        self.norm = RMSNorm(builder, f"{layer}.post_per_layer_input_norm", config.hidden_size)
        self._activation = ACTIVATIONS[config.activation]
        local = inputs.size // comm.size
        self._columns = slice(comm.rank * local, (comm.rank + 1) * local)

    def add_(self, x: Tensor, own: Tensor) -> Tensor:
        """Add to the residual stream [num_tokens, hidden_size], in place. `own`: [num_tokens, size]."""
        dtype = self.norm.weight.dtype
        gated = self._activation(self.gate(x.to(dtype)).float()).mul_(own[:, self._columns])
        return x.add_(self.norm(self.projection(gated.to(dtype))))

    def leaves(self) -> Iterator[Leaf]:
        yield from (self.gate, self.projection, self.norm)
