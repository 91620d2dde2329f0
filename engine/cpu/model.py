"""A loaded model as C++ takes it: every matrix packed, every block described (`described.py`).

    NativeModel(decoder, cache)   takes the decoder's matrices over, one by one, so that memory never holds two models

It has code for `Attention`, gated or not, `LatentAttention` or what keeps a state (`GatedDeltaNet`, `Mamba`,
`ShortConvolution`), for attention beside a state, and behind each `GatedMLP`, `PlainMLP` or `SparseMLP`, stacked
experts too, or nothing, over plain weights in bfloat16 or float32 and over quantized ones (`packing.py`), each linear
as it is; a model of other blocks is left to torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ...common.config import CpuIsa
from ...models.config import ModelConfig
from ...models.native import not_in_native
from ...models.parts.chunks import Chunk
from ..nn.adapters import AdapterSlots
from ..nn.decoder import Decoder, DecoderLayer
from ..nn.delta_net import GatedDeltaNet
from ..nn.experts import SharedGate, SparseMLP
from ..nn.feed_forward import MLP
from ..nn.latent import LatentAttention
from ..nn.layers import Linear, RMSNorm
from ..nn.mixer import Attention, NormedValueAttention
from ..nn.residual import InputTable
from ..nn.stacked_experts import StackedExpert
from ..ranks.communicator import Communicator
from ..weights.weight import DenseWeight
from . import states
from .adapters import SlotMemory, StripAdapters, whole_strips
from .blocks import Blocks, known_blocks, mlps_of
from .build import load
from .compiler import NativeUnavailable
from .described import (
    AttentionParts,
    ExpertParts,
    LatentParts,
    LayerInputParts,
    LayerParts,
    LinearParts,
    MLPParts,
    Model,
    OwnInputParts,
    SightParts,
    StateParts,
)
from .outline import outline
from .packing import Packer, address, check_known, two_apart

_DTYPES = (torch.bfloat16, torch.float32)  # elements, of which a library knows one


class NativeModel:
    """A rank's weights in C++'s form, and the library for them. It keeps the memory that `described` points to."""

    def __init__(self, decoder: Decoder, cache: Path, isa: CpuIsa = "auto") -> None:
        """Raises NativeUnavailable, and has then left the decoder as it was; ConfigError as `load` does."""
        self.dtype = decoder.dtype
        if self.dtype not in _DTYPES:
            raise NativeUnavailable(f"no C++ for {self.dtype}")
        is_float32 = self.dtype == torch.float32
        self.expert_plan = decoder.expert_plan
        _check_parts(decoder, is_float32=is_float32)
        blocks = known_blocks(decoder.layers)
        linears = [linear for linear in decoder.linears() if not isinstance(linear, SharedGate)]  # read as they are
        weights = [check_known(linear, self.dtype) for linear in linears]
        self.comm = decoder.head.rows.comm
        self.library = _common_library(self.comm, cache, isa, is_float32=is_float32)
        self.name = Path(self.library._name).stem  # instruction set, source and compiler
        self._pack = Packer(self.library, self.dtype)
        for layer in decoder.layers:
            if layer.sparse is not None:
                layer.sparse.gate.take_factors()
        self._packed = {
            id(weight): self._pack(weight, in_turns=linear.in_turns)
            for weight, linear in zip(weights, linears, strict=True)
        }
        self._keep: list[object] = [decoder, weights]
        self.bounded_ = decoder.bounded_  # of logits
        self._linears: list[tuple[Linear, LinearParts]] = []  # of the layers, with their descriptions
        self._of_experts: dict[int, LinearParts] = {}  # those of linears that are given some of a step's rows, by id
        self.num_logits = decoder.head.linear.weight.num_outputs  # of this rank
        self.has_head = decoder.config.has_head
        self.described = self._describe(decoder, blocks)
        config, attending = decoder.config, [each for each in enumerate(blocks) if each[1].attention is not None]
        # Of each layer of C++ that attends, by its number there, which of a block's keys and values it reads.
        self.pages = {number: page for number, block in attending if (page := config.page_of(block.number)) is not None}
        self.pages_behind = [config.pages_behind(block.number) for _, block in attending]

    def _describe(self, decoder: Decoder, blocks: list[Blocks]) -> Model:
        config = decoder.config
        layers = (LayerParts * len(blocks))()
        for block, target in zip(blocks, layers, strict=True):
            feed_forward, (first, last) = block.feed_forward, block.layers
            target.input_norm, target.mixed_norm = _weight_of(first.input_norm), _weight_of(first.mixed_norm)
            target.mlp_norm, target.output_norm = _weight_of(last.mlp_norm), _weight_of(last.output_norm)
            target.is_local = first.is_local and config.local_rope is not None
            if config.family.norms == "shared":
                target.is_fed_first, target.mlp_norm = True, target.input_norm
            if first.input_norm is not None and config.multipliers.attention_in != 1.0:
                target.input_norm = self._multiplied(first.input_norm, config.multipliers.attention_in)
            self._describe_mixers(block, target.attention, config)
            if isinstance(feed_forward, MLP):
                target.mlp = self._mlp(feed_forward)
                gate_up, down = feed_forward.gate_up_proj, feed_forward.down_proj
                self._linears += [(gate_up, target.mlp.gate_up), (down, target.mlp.down)]
            if isinstance(feed_forward, SparseMLP):
                target.experts = ctypes.pointer(self._experts(feed_forward, last.mlp_norm))
            elif block.beside is not None:
                beside = block.beside
                target.experts = ctypes.pointer(self._experts(beside.sparse, beside.sparse.row_norm))
                target.mlp_behind, target.experts_behind = address(beside.mlp_norm.weight), address(beside.norm.weight)
            self._describe_end(last, target)
        model = outline(decoder)
        if decoder.input_table is not None:
            model.inputs = ctypes.pointer(self._inputs(decoder.input_table))
        model.num_layers = len(blocks)
        model.intermediate_size = max(mlp.num_inner for block in blocks for mlp in mlps_of(block))
        model.embedding = address(decoder.embedding.weight.plain)
        model.final_norm = address(decoder.final_norm.weight)
        if config.has_head:
            model.head = self._linear(decoder.head.linear, None).weight
        model.layers = layers
        return model

    def _describe_mixers(self, block: Blocks, target: AttentionParts, config: ModelConfig) -> None:
        attention, mixer, multipliers = block.attention, block.state, config.multipliers
        if isinstance(attention, LatentAttention):
            target.latents = ctypes.pointer(self._latents(attention))
        elif attention is not None:
            self._describe_heads(attention, target, config.sliding_windows[block.number])
        output = None if attention is None else attention.o_proj
        bias = None if output is None else output.sum_bias
        if mixer is not None:
            state = self._state(mixer, multipliers.state_in / multipliers.attention_in)
            self._keep.append(state)
            target.state = ctypes.cast(ctypes.byref(state), ctypes.POINTER(StateParts))
            if output is None:
                output, bias = mixer.out_proj, mixer.out_proj.sum_bias
            else:
                state.out_factor = multipliers.state_out / multipliers.attention_out
                state.out = self._linear(mixer.out_proj, None)
                bias = _sum(bias, mixer.out_proj.sum_bias, state.out_factor)
                self._linears.append((mixer.out_proj, state.out))
        assert output is not None
        target.o = self._linear(output, bias)
        self._linears.append((output, target.o))

    def _describe_heads(self, attention: Attention, target: AttentionParts, window: int | None) -> None:
        target.qkv = self._linear(attention.qkv_proj, attention.qkv_proj.bias)
        target.num_made, target.norms_values = attention.num_made, isinstance(attention, NormedValueAttention)
        norms = attention.head_norms or attention.whole_norms
        for name, norm in zip(("q_norm", "k_norm"), norms, strict=False):
            setattr(target, name, address(norm.weight))
        if attention.bare_eps is not None:
            target.q_norm = target.k_norm = self._ones(attention.head_dim)
        target.has_whole_norms = bool(attention.whole_norms)
        if attention.sinks is not None:
            target.sinks = address(attention.sinks.weight)
        target.sight = SightParts(window or 0, isinstance(window, Chunk))
        self._linears.append((attention.qkv_proj, target.qkv))

    def _latents(self, attention: LatentAttention) -> LatentParts:
        latent, norm = attention.latent, attention.kv_norm
        packed = [self._pack.heads(matrices) for matrices in attention.heads.take()]
        self._keep += packed
        of_keys, of_values = (each.tiles for each in packed)
        described = LatentParts(
            inputs=self._linear(attention.a_proj, attention.a_proj.bias),
            queries=self._linear(attention.q_proj, None),
            to_keys=of_keys,
            to_values=of_values,
            kv_norm=address(norm.weight),
            q_norm=_weight_of(attention.q_norm),
            kv_rank=latent.kv_rank,
            nope_dim=latent.nope_dim,
            value_dim=latent.value_dim,
            q_rank=latent.q_rank or 0,
            is_interleaved=latent.is_interleaved,
            norm_eps=norm.eps,
        )
        self._linears += [(attention.a_proj, described.inputs), (attention.q_proj, described.queries)]
        return described

    def _state(self, mixer: states.Stateful, inputs: float) -> StateParts:
        described = states.describe(mixer, self._linear, self._keep, inputs=inputs)
        if isinstance(mixer, GatedDeltaNet):
            self._linears += [(mixer.rows_proj, described.rows), (mixer.rates_proj, described.rates)]
        else:
            self._linears.append((mixer.in_proj, described.rows))
        return described

    def _describe_end(self, layer: DecoderLayer, target: LayerParts) -> None:
        """Describe what a layer does to the residual stream behind its blocks."""
        target.factor = 1.0 if layer.factor is None else float(layer.factor.weight)
        if (own := layer.own_input) is not None:
            gate, projection = self._linear(own.gate, None), self._linear(own.projection, None)
            target.own_input = OwnInputParts(gate, projection, address(own.norm.weight))
            described = target.own_input
            self._linears += [(own.gate, described.gate), (own.projection, described.projection)]

    def _inputs(self, table: InputTable) -> LayerInputParts:
        described = LayerInputParts(
            made=self._linear(table.projection, None),
            norm=address(table.norm.weight),
            table=address(table.table.weight.plain),
            size=table.size,
            made_factor=table.made_multiplier,
            table_factor=table.multiplier,
        )
        self._linears.append((table.projection, described.made))
        return described

    def _mlp(self, mlp: MLP | StackedExpert) -> MLPParts:
        gate_up, down = mlp.gate_up_proj, mlp.down_proj
        bias = down.bias if isinstance(mlp, StackedExpert) else mlp.down_proj.sum_bias
        return MLPParts(self._linear(gate_up, gate_up.bias), self._linear(down, bias))

    def _experts(self, sparse: SparseMLP, norm: RMSNorm | None) -> ExpertParts:
        config, factors = sparse.gate.experts, sparse.gate.factors
        experts = (MLPParts * len(sparse.experts))(*map(self._mlp, sparse.experts))
        for expert, target in zip(sparse.experts, experts, strict=True):
            self._of_experts |= {id(expert.gate_up_proj): target.gate_up, id(expert.down_proj): target.down}
        shared = None if sparse.shared is None else self._mlp(sparse.shared)
        if sparse.shared is not None and shared is not None:
            self._linears += [(sparse.shared.gate_up_proj, shared.gate_up), (sparse.shared.down_proj, shared.down)]
        described = ExpertParts(
            gate=self._linear(sparse.gate, sparse.gate.bias),
            norm=_weight_of(norm),
            gate_norm=None if factors is None else self._ones(len(factors[0])),
            weights=None if factors is None else address(factors[1]),
            score_bias=address(sparse.gate.score_bias),
            experts=experts,
            shared=None if shared is None else ctypes.pointer(shared),
            shared_gate=None if sparse.shared_gate is None else self._plain(sparse.shared_gate),
            num_experts=config.num_experts,
            num_chosen=config.num_chosen,
            count=len(sparse.experts),
            num_groups=config.num_groups,
            num_chosen_groups=config.num_chosen_groups,
            is_sigmoid=config.scoring == "sigmoid",
            is_normalised=config.normalised,
            scales_inputs=config.scales_inputs,
            scale=config.scale,
            limit=config.limit if config.is_stacked else 0.0,
            alpha=config.alpha,
            taken=address(sparse.taken),
            place=address(self._places(sparse)),
            copies=None if sparse.replicas is None else address(sparse.replicas.copies),
            turn=None if sparse.replicas is None else address(sparse.replicas.turn),
        )
        if (thin := sparse.narrowing) is not None:
            described.before, described.behind = self._linear(thin.before, None), self._linear(thin.behind, None)
            self._linears += [(thin.before, described.before), (thin.behind, described.behind)]
        return described

    def _places(self, sparse: SparseMLP) -> Tensor:
        """Return where each expert stands among this rank's; -1: elsewhere."""
        places = torch.full((len(sparse.taken),), -1, dtype=torch.int32)
        places[list(sparse.held)] = torch.arange(len(sparse.held), dtype=torch.int32)
        self._keep.append(places)
        return places

    def _multiplied(self, norm: RMSNorm, factor: float) -> int | None:
        """Return the address of its weights, so that what it yields is multiplied."""
        self._keep.append(weight := ((norm.weight.float() + norm.offset) * factor - norm.offset).to(self.dtype))
        return address(weight)

    def _ones(self, size: int) -> int | None:
        """Return the address of a norm's weights that has none."""
        self._keep.append(ones := torch.ones(size, dtype=self.dtype))
        return address(ones)

    def _plain(self, linear: Linear) -> int | None:
        assert isinstance(linear.weight, DenseWeight)
        return address(linear.weight.plain)

    def _linear(self, linear: Linear, bias: Tensor | None) -> LinearParts:
        if bias is not None:
            bias = two_apart(bias) if linear.in_turns else bias
            self._keep.append(bias := bias.to(self.dtype))  # a gate's is float32
        return LinearParts(self._packed[id(linear.weight)].tiles, address(bias))

    def linears(self) -> Iterator[Linear]:
        """Yield those that C++ adds adapters to."""
        return (linear for linear, _ in self._linears)

    def adapt(self, slots: AdapterSlots, memory: SlotMemory) -> None:
        """Let products have the adapters of these slots. Before a decoder is made of the model."""
        self._adapters = (slots, memory)
        self.described.adapter_rank = whole_strips(slots.max_rank)
        for linear, target in self._linears:
            if isinstance(linear.adapters, StripAdapters):
                target.adapters = ctypes.addressof(linear.adapters.described)

    def point_to(self, linear: Linear, adapters: int) -> None:
        """Let an expert's products have the adapters that stand at an address; of a step's slots nothing changes."""
        self._of_experts[id(linear)].adapters = adapters


def _common_library(comm: Communicator, cache: Path, isa: CpuIsa, *, is_float32: bool) -> ctypes.CDLL:
    """Load the library. Raises NativeUnavailable on all ranks if one has none: their sums would never meet."""
    try:
        library = load(cache, isa, is_float32=is_float32)
    except NativeUnavailable:
        comm.minimum(0, torch.device("cpu"))
        raise
    if not comm.minimum(1, torch.device("cpu")):
        raise NativeUnavailable("another rank could not load its library")
    return library


def _check_parts(decoder: Decoder, *, is_float32: bool) -> None:
    """Raise NativeUnavailable for what a family has and C++ has not."""
    config, plan = decoder.config, decoder.expert_plan
    if missing := not_in_native(
        config,
        config.quantization,
        is_float32=is_float32,
        is_exchanged=plan is not None and plan.is_exchanged,
        num_ranks=decoder.head.rows.comm.size,
    ):
        raise NativeUnavailable(f"no C++ for {', '.join(missing)}")


def _weight_of(norm: RMSNorm | None) -> int | None:
    return None if norm is None else address(norm.weight)


def _sum(bias: Tensor | None, other: Tensor | None, factor: float) -> Tensor | None:
    """Return the bias of two products whose sum has another `factor` of the second."""
    if other is None:
        return bias
    return other * factor if bias is None else bias + other * factor
