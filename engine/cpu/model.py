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

from ...common.config import CpuIsa
from ...models.native import not_in_native
from ..nn.adapters import AdapterSlots
from ..nn.decoder import Decoder
from ..nn.experts import SharedGate
from ..nn.layers import Linear
from ..ranks.communicator import Communicator
from .adapters import SlotMemory, StripAdapters, whole_strips
from .blocks import Blocks, known_blocks, mlps_of
from .build import load
from .compiler import NativeUnavailable
from .described import LayerParts, Model
from .feed_forwards import describe_end, describe_feed_forward, describe_inputs, take_factors
from .mixers import describe_mixers
from .outline import outline
from .packing import Packer, address, check_known
from .weights import Weights, weight_of

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
        for layer in decoder.layers:
            if layer.sparse is not None:
                take_factors(layer.sparse.gate)
        self._weights = Weights(Packer(self.library, self.dtype), self.dtype)
        for linear, weight in zip(linears, weights, strict=True):
            self._weights.take(linear, weight)
        self._weights.keep.append(decoder)
        self.bounded_ = decoder.bounded_  # of logits
        self.num_logits = decoder.head.linear.weight.num_outputs  # of this rank
        self.has_head = decoder.config.has_head
        self.described = self._describe(decoder, blocks)
        config, attending = decoder.config, [each for each in enumerate(blocks) if each[1].attention is not None]
        # Of each layer of C++ that attends, by its number there, which of a block's keys and values it reads.
        self.pages = {number: page for number, block in attending if (page := config.page_of(block.number)) is not None}
        self.pages_behind = [config.pages_behind(block.number) for _, block in attending]

    def _describe(self, decoder: Decoder, blocks: list[Blocks]) -> Model:
        config, weights = decoder.config, self._weights
        layers = (LayerParts * len(blocks))()
        for block, target in zip(blocks, layers, strict=True):
            first, last = block.layers
            target.input_norm, target.mixed_norm = weight_of(first.input_norm), weight_of(first.mixed_norm)
            target.mlp_norm, target.output_norm = weight_of(last.mlp_norm), weight_of(last.output_norm)
            target.is_local = first.is_local and config.local_rope is not None
            if config.family.norms == "shared":
                target.is_fed_first, target.mlp_norm = True, target.input_norm
            if first.input_norm is not None and config.multipliers.attention_in != 1.0:
                target.input_norm = weights.multiplied(first.input_norm, config.multipliers.attention_in)
            describe_mixers(weights, block, target.attention, config)
            describe_feed_forward(weights, block, target)
            describe_end(weights, last, target)
        model = outline(decoder)
        if decoder.input_table is not None:
            model.inputs = ctypes.pointer(describe_inputs(weights, decoder.input_table))
        model.num_layers = len(blocks)
        model.intermediate_size = max(mlp.num_inner for block in blocks for mlp in mlps_of(block))
        model.embedding = address(decoder.embedding.weight.plain)
        model.final_norm = address(decoder.final_norm.weight)
        if config.has_head:
            model.head = weights.linear(decoder.head.linear, None).weight
        model.layers = layers
        return model

    def linears(self) -> Iterator[Linear]:
        """Yield those that C++ adds adapters to."""
        return (linear for linear, _ in self._weights.linears)

    def adapt(self, slots: AdapterSlots, memory: SlotMemory) -> None:
        """Let products have the adapters of these slots. Before a decoder is made of the model."""
        self._adapters = (slots, memory)
        self.described.adapter_rank = whole_strips(slots.max_rank)
        for linear, target in self._weights.linears:
            if isinstance(linear.adapters, StripAdapters):
                target.adapters = ctypes.addressof(linear.adapters.described)

    def point_to(self, linear: Linear, adapters: int) -> None:
        """Let an expert's products have the adapters that stand at an address; of a step's slots nothing changes."""
        self._weights.of_experts[id(linear)].adapters = adapters


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
