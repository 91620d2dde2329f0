"""A step of all layers with fused kernels, over the weights of a `Decoder`: the path on CUDA.

    embedding -> norm -> [ QKV -> head norms -> rotation -> attention -> O -> add and norm -> gate, up -> SiLU -> down
                           -> add and norm (the next layer's, or the final one) ] -> hidden states -> logits

The residual stream is in the weights' type and the head's product in float32. Cosines and sines come from a table,
rounded to the weights' type as in the reference implementation. Every tensor that it makes has a shape that follows
from the number of tokens alone and nothing is read back, so that a step can be captured in a CUDA graph. A model of
a family with other parts between its blocks runs as `Decoder` has it, around the same attention. Latents are projected
and turned in torch, which every rank's graph holds like the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from ..nn.decoder import Decoder, DecoderLayer
from ..nn.experts import SparseMLP
from ..nn.feed_forward import MLP, FeedForward, GatedMLP
from ..nn.layers import RMSNorm
from ..nn.mixer import Attention
from ..nn.rotary import RotaryEmbedding
from ..weights.weight import DenseWeight
from .adapters import DeviceSlots
from .experts import GroupedExperts, RealRows
from .kernels import Kernels

if TYPE_CHECKING:
    from ..nn.attention.base import AttentionBackend

_TABLE_ROWS = 8192  # made at once


class PagedAttention(Protocol):
    """Attention that was planned for the step."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        """Do as `attention.base.AttentionBackend.forward` does."""
        ...


class FusedDecoder:
    """Owned by the engine's thread, like the decoder whose weights it reads."""

    def __init__(self, decoder: Decoder, kernels: Kernels) -> None:
        self._decoder = decoder
        self._kernels = kernels
        self._is_fused = _is_fused(decoder)
        self._slots = decoder.adapters.rows if isinstance(decoder.adapters, DeviceSlots) else None
        self._real_rows: RealRows | None = None  # None: no experts count them
        for grouped in filter(None, (_grouped(layer.sparse) for layer in decoder.layers)):
            self._real_rows = grouped.rows
            if grouped.is_silu:
                grouped.activate = kernels.silu_and_mul
        self._has_latents = decoder.config.latent is not None
        num_positions = decoder.config.max_model_len if self._is_fused and not self._has_latents else 0
        self._cos_sin = cos_sin_table(decoder.rotary, num_positions, decoder.dtype)

    @property
    def adapter_choices(self) -> tuple[bool, ...]:
        """Tell of which steps there are graphs: without adapters, and with some if there are slots."""
        return (False,) if self._slots is None else (False, True)

    @property
    def plain(self) -> Decoder:
        """Return the decoder whose weights these are."""
        return self._decoder

    @property
    def can_be_captured(self) -> bool:
        """Tell whether what a step launches depends on its number of tokens alone."""
        blocks = chain.from_iterable((layer.feed_forward, layer.sparse) for layer in self._decoder.layers)
        return all(block is None or isinstance(block, MLP) or _grouped(block) is not None for block in blocks)

    def note(self, num_tokens: int) -> None:
        """Say before a step how many of its tokens are none of padding."""
        if self._real_rows is not None:
            self._real_rows.count.fill_(num_tokens)

    def forward(
        self,
        input_ids: Tensor,  # [num_tokens] int64
        positions: Tensor,  # [num_tokens] int32
        attention: PagedAttention,
        on_layer: Callable[[int], None] | None = None,
        adapters: Tensor | None = None,  # [num_tokens] int32: slots; None: no token has one
    ) -> Tensor:
        """Return hidden states behind the final norm, [num_tokens, hidden_size]."""
        if self._slots is not None:
            self._slots.begin(adapters)
        if self._real_rows is not None:
            self._real_rows.begin(len(input_ids))
        decoder, kernels = self._decoder, self._kernels
        if not self._is_fused:
            hidden = decoder.forward(input_ids, positions.long(), cast("AttentionBackend", attention), on_layer)
            return decoder.final_norm(hidden)
        rope = decoder.rotary(positions.long(), decoder.dtype) if self._has_latents else None
        residual = decoder.embedding(input_ids)
        first, *input_norms = (_norm(layer.input_norm) for layer in decoder.layers)
        x = kernels.rms_norm(residual, first.weight, first.eps)
        next_norms = [*input_norms, decoder.final_norm]
        for layer, next_norm in zip(decoder.layers, next_norms, strict=True):
            mixer, feed_forward = layer.mixer, layer.feed_forward
            assert mixer is not None and feed_forward is not None, "no kernels for layers of one block"
            if rope is None:
                x = self._attend(layer, x, positions, attention, on_layer)
            else:
                mixed = layer.mix(mixer.project(x, rope), cast("AttentionBackend", attention), on_layer)
                x = mixer.output(mixed)
            mlp_norm = _norm(layer.mlp_norm)
            kernels.add_norm_(x, residual, mlp_norm.weight, mlp_norm.eps)
            x = self._feed_forward(feed_forward, x)
            kernels.add_norm_(x, residual, next_norm.weight, next_norm.eps)
        return x

    def _attend(
        self,
        layer: DecoderLayer,
        x: Tensor,
        positions: Tensor,
        attention: PagedAttention,
        on_layer: Callable[[int], None] | None,
    ) -> Tensor:
        own = layer.mixer
        assert type(own) is Attention, "no kernels for this mixer"
        num_q, num_kv, dim = own.num_qo_heads, own.num_kv_heads, own.head_dim
        heads = own.qkv_proj(x).view(x.shape[0], num_q + 2 * num_kv, dim)
        q, k, v = torch.split(heads, [num_q, num_kv, num_kv], 1)  # [num_tokens, heads, head_dim]
        for part, norm in zip((q, k), own.head_norms, strict=False):
            self._kernels.norm_heads_(part, norm.weight, norm.eps)
        self._kernels.rotate_(q, k, positions, self._cos_sin)
        out = attention.forward(q, k, v, own.page)
        if on_layer is not None:
            on_layer(own.page)
        return own.output(out.view(x.shape[0], num_q * dim))

    def _feed_forward(self, block: FeedForward, x: Tensor) -> Tensor:
        if type(block) is GatedMLP:
            return block.down_proj(self._kernels.silu_and_mul(block.gate_up_proj(x)))
        return block(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Turn [rows, hidden_size] of `forward` into [rows, vocab_size] float32; a collective with several ranks."""
        rows = self._decoder.head.rows
        assert isinstance(rows.weight, DenseWeight), "no kernels for another head"
        local = self._kernels.logits(hidden, rows.weight.plain)
        return self._decoder.bounded_(rows.comm.all_gather(local)[:, : rows.vocab_size])


def _grouped(block: FeedForward | None) -> GroupedExperts | None:
    return block.grouped if isinstance(block, SparseMLP) and isinstance(block.grouped, GroupedExperts) else None


def _is_fused(decoder: Decoder) -> bool:
    """Tell whether there are kernels for all that lies between two blocks, and for attention's own parts."""
    config, family = decoder.config, decoder.config.family
    is_plain = family.norms == "before" and not family.norm_offset and family.head_norms not in ("turned", "whole")
    rope, is_one_rope = config.rope, config.local_rope is None
    is_turned_at_once = is_one_rope and rope.fraction == 1.0 and not rope.has_neighbours and not rope.query_beta
    has_multipliers = config.embedding_multiplier != 1.0 or config.residual_multiplier != 1.0
    if has_multipliers or config.states is not None or config.blocks:
        return False
    return is_plain and is_turned_at_once and config.activation == "silu"


def _norm(norm: RMSNorm | None) -> RMSNorm:
    assert norm is not None, "no kernels for another place of norms"
    return norm


def cos_sin_table(rotary: RotaryEmbedding, num_positions: int, dtype: torch.dtype) -> Tensor:
    """Return [num_positions, head_dim] float32: cosines of half a head, then its sines, each rounded to `dtype`."""
    device = rotary.inv_freq.device
    table = torch.empty(num_positions, 2 * len(rotary.inv_freq), device=device)
    for start in range(0, num_positions, _TABLE_ROWS):
        positions = torch.arange(start, min(start + _TABLE_ROWS, num_positions), device=device)
        cos, signed_sin, _ = rotary(positions, dtype)  # [rows, 1, head_dim], halves (cos, cos) and (-sin, sin)
        half = cos.shape[-1] // 2
        table[start : start + len(positions)] = torch.cat((cos[:, 0, :half], signed_sin[:, 0, half:]), 1)
    return table
