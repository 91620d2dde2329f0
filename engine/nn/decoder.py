"""The decoder on packed tokens: [num_tokens, hidden_size], rows of many sequences in a line.

Which sequence a token belongs to is the attention backend's concern (it was planned for the step); this module
knows neither batches nor pages, nor of what kind a layer's blocks are (`blocks.py`). One `Decoder` is one
tensor-parallel rank's share of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...models.config import ModelConfig
from ...models.parts.expert_plan import ExpertPlan
from ..ranks.communicator import Communicator
from ..weights.weight import Leaf, WeightSlot
from .adapters import AdapterSlots
from .attention.base import AttentionBackend
from .blocks import make_experts_beside, make_feed_forward, make_mixer
from .builder import Builder
from .experts import SparseMLP
from .layers import Linear, ParallelEmbedding, ParallelHead, RMSNorm, Sinks
from .mixer import SideBySide, StatefulMixer
from .residual import InputTable, LayerFactor, OwnInput
from .rotary import Rope, RotaryEmbedding
from .states import LayerStates

Ropes = tuple[Rope, Rope]  # of a step: for layers that see all keys, for those with a window


class DecoderLayer:
    """Mixer and feed-forward, or one of them, each with a norm before it or behind it, or both, and added to the
    residual stream.

    A call is `project`, `mix` and `finish_`; the first and the last may be given parts of the tokens.
    """

    def __init__(self, builder: Builder, layer_id: int) -> None:
        config, name = builder.config, f"model.layers.{layer_id}"
        self._pages = config.pages_behind(layer_id)
        self.is_local = config.local_layers[layer_id]
        self._dtype = builder.dtype
        self._multiplier = config.residual_multiplier
        self._fed_multiplier = config.residual_multiplier * config.multipliers.fed
        self._is_side_by_side = config.family.norms == "shared"
        self.input_norm, self.mixed_norm, self.mlp_norm, self.output_norm = (
            None if norm is None else RMSNorm(builder, f"{name}.{norm}", config.hidden_size)
            for norm in config.norm_names(layer_id)
        )
        self.mixer = make_mixer(builder, name, layer_id) if config.has_mixer(layer_id) else None
        self.feed_forward = make_feed_forward(builder, name, layer_id) if config.has_feed_forward(layer_id) else None
        self.beside = make_experts_beside(builder, name, layer_id) if config.has_feed_forward(layer_id) else None
        inputs = config.layer_inputs
        self.own_input = None if inputs is None else OwnInput(builder, name, inputs)
        self.factor = LayerFactor(builder, f"{name}.layer_scalar") if config.family.has_layer_factors else None

    @property
    def sparse(self) -> SparseMLP | None:
        """Return the layer's experts, if it has any."""
        block = self.feed_forward if self.beside is None else self.beside.sparse
        return block if isinstance(block, SparseMLP) else None

    def __call__(
        self,
        x: Tensor,
        ropes: Ropes,
        backend: AttentionBackend,
        on_layer: Callable[[int], None] | None,
        own: Tensor | None,
    ) -> Tensor:
        return self.finish_(x, self.mix(self.project(x, ropes), backend, on_layer), own)

    def project(self, x: Tensor, ropes: Ropes) -> Tensor:
        if self.mixer is None:
            return x.new_empty(len(x), 0)
        return self.mixer.project(self._normed(self.input_norm, x), ropes[self.is_local])

    def mix(self, projected: Tensor, backend: AttentionBackend, on_layer: Callable[[int], None] | None) -> Tensor:
        mixed = projected if self.mixer is None else self.mixer.mix(projected, backend)
        if on_layer is not None:
            for page in self._pages:
                on_layer(page)
        return mixed

    def finish_(self, x: Tensor, mixed: Tensor, own: Tensor | None) -> Tensor:
        """`own`: the layer's own input of these tokens, where it has any."""
        mixer, feed_forward = self.mixer, self.feed_forward
        if self._is_side_by_side:
            assert mixer is not None and feed_forward is not None
            fed = feed_forward(self._normed(self.input_norm, x))
            return x.add_(mixer.output(mixed)).add_(fed)
        if mixer is not None:
            x.add_(self._normed(self.mixed_norm, mixer.output(mixed)), alpha=self._multiplier)
        if feed_forward is not None:
            fed = feed_forward(self._normed(self.mlp_norm, x))
            if self.beside is not None:
                fed = self.beside(fed, x)
            x.add_(self._normed(self.output_norm, fed), alpha=self._fed_multiplier)
        if self.own_input is not None:
            assert own is not None
            self.own_input.add_(x, own)
        return x if self.factor is None else x.mul_(self.factor.weight)

    def _normed(self, norm: RMSNorm | None, x: Tensor) -> Tensor:
        return x.to(self._dtype) if norm is None else norm(x)

    def leaves(self) -> Iterator[Leaf]:
        yield from filter(None, (self.input_norm, self.mixed_norm))
        if self.mixer is not None:
            yield from self.mixer.leaves()
        yield from filter(None, (self.mlp_norm, self.output_norm))
        if self.feed_forward is not None:
            yield from self.feed_forward.leaves()
        if self.beside is not None:
            yield from self.beside.leaves()
        if self.own_input is not None:
            yield from self.own_input.leaves()
        if self.factor is not None:
            yield self.factor


class Decoder:
    """One rank's decoder; its weights are filled by `weights.load_weights`."""

    def __init__(
        self,
        config: ModelConfig,
        comm: Communicator,
        *,
        dtype: torch.dtype,
        device: torch.device,
        expert_plan: ExpertPlan | None = None,
    ) -> None:
        config.check_tp_size(comm.size, whole_experts=expert_plan is not None)
        self.config = config
        self.dtype = dtype
        self.expert_plan = expert_plan
        self.states = None if config.states is None else LayerStates(config.states.of_rank(comm.size))
        builder = Builder(config, comm, dtype, device, expert_plan, self.states)
        self.embedding = ParallelEmbedding(builder, "model.embed_tokens")
        inputs = config.layer_inputs
        self.input_table = None if inputs is None else InputTable(builder, inputs)
        self.layers = [DecoderLayer(builder, layer_id) for layer_id in range(config.num_layers)]
        self.final_norm = RMSNorm(builder, f"model.{config.family.final_norm}", config.hidden_size)
        self.head = ParallelHead(builder, self.embedding)
        length, local = config.max_model_len, config.local_rope
        local_dim = config.rotary_dim if config.uneven is None else config.head_dim
        self.rotary = RotaryEmbedding(config.rope, config.rotary_dim, device, max_model_len=length)
        self.local_rotary = None if local is None else RotaryEmbedding(local, local_dim, device)
        # As the reference implementation has it: rounded to the weights' type.
        self.multiplier = float(torch.tensor(config.embedding_multiplier, dtype=dtype))
        self.adapters: AdapterSlots | None = None  # None: no request has one

    def forward(
        self,
        input_ids: Tensor,  # [num_tokens] int64
        positions: Tensor,  # [num_tokens] int64
        backend: AttentionBackend,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return hidden states before the final norm, [num_tokens, hidden_size]. The backend is planned for this batch.

        On a CPU the residual stream is float32 whatever the weights are: it costs next to nothing there, and sixty
        additions rounded to bfloat16 are where most of a small model's error comes from.
        """
        x, ropes = self.embed(input_ids), self.ropes(positions)
        inputs = self.own_inputs(input_ids, x)
        for layer, own in zip(self.layers, inputs, strict=True):
            x = layer(x, ropes, backend, on_layer, own)
        return x

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the residual stream as it begins."""
        x = self.embedding(input_ids)
        if x.device.type == "cpu":
            x = x.float()
        return x if self.multiplier == 1.0 else x.mul_(self.multiplier)

    def own_inputs(self, input_ids: Tensor, x: Tensor) -> Sequence[Tensor | None]:
        """Return each layer's own input of tokens, [num_tokens, size], as the residual stream begins."""
        return [None] * len(self.layers) if self.input_table is None else self.input_table(input_ids, x).unbind(1)

    def ropes(self, positions: Tensor) -> Ropes:
        rope = self.rotary(positions, self.dtype)
        return rope, rope if self.local_rotary is None else self.local_rotary(positions, self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Turn [rows, hidden_size] of `forward` into [rows, vocab_size] float32."""
        return self.bounded_(self.head(self.final_norm.in_type_of(hidden)))

    def bounded_(self, logits: Tensor) -> Tensor:
        """Bring the head's products to the size that the model gives its logits, in place."""
        divisor, cap = self.config.logits_divisor, self.config.logits_cap
        if divisor != 1.0:
            logits.div_(divisor)
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def leaves(self) -> Iterator[Leaf]:
        """Yield all that holds weights, in the order of a step."""
        yield self.embedding
        if self.input_table is not None:
            yield from self.input_table.leaves()
        for layer in self.layers:
            yield from layer.leaves()
        yield self.final_norm
        if self.head.rows is not self.embedding:
            yield self.head.rows

    def sinks(self) -> list[Tensor] | None:
        """Return each layer's sinks; None: it has none."""
        found = [leaf.weight for leaf in self.leaves() if isinstance(leaf, Sinks)]
        return found or None

    def slots(self) -> Iterator[WeightSlot]:
        for leaf in self.leaves():
            yield from leaf.slots()

    def stateful_mixers(self) -> list[StatefulMixer]:
        """List the layers' mixers that keep a state."""
        mixers = (layer.mixer for layer in self.layers)
        parts = (mixer.stateful if isinstance(mixer, SideBySide) else mixer for mixer in mixers)
        return [part for part in parts if isinstance(part, StatefulMixer)]

    def linears(self) -> Iterator[Linear]:
        """Yield those that steps multiply by: not the head's of a model without one, whose logits nobody wants."""
        yield from (leaf for leaf in self.leaves() if isinstance(leaf, Linear))
        if self.config.has_head:
            yield self.head.linear

    def pack(self) -> None:
        """Block the loaded weights for torch on a CPU, one by one so that memory never holds two models."""
        for linear in self.linears():
            linear.weight.pack()
