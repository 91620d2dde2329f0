"""Mixers as C++ takes them: attention over heads' keys and values or over latents, what keeps a state, or both."""

from __future__ import annotations

import ctypes

from torch import Tensor

from ...models.config import ModelConfig
from ...models.parts.chunks import Chunk
from ..nn.latent import LatentAttention
from ..nn.mixer import Attention, NormedValueAttention
from . import states
from .blocks import Blocks
from .described import AttentionParts, LatentParts, SightParts, StateParts
from .packing import address
from .weights import Weights, weight_of


def describe_mixers(weights: Weights, block: Blocks, target: AttentionParts, config: ModelConfig) -> None:
    """Describe a block's mixers, with the last product of both."""
    attention, mixer, multipliers = block.attention, block.state, config.multipliers
    if isinstance(attention, LatentAttention):
        target.latents = ctypes.pointer(_latents(weights, attention))
    elif attention is not None:
        _describe_heads(weights, attention, target, config.sliding_windows[block.number])
    output = None if attention is None else attention.o_proj
    bias = None if output is None else output.sum_bias
    if mixer is not None:
        state = states.describe(weights, mixer, multipliers.state_in / multipliers.attention_in)
        weights.keep.append(state)
        target.state = ctypes.cast(ctypes.byref(state), ctypes.POINTER(StateParts))
        if output is None:
            output, bias = mixer.out_proj, mixer.out_proj.sum_bias
        else:
            state.out_factor = multipliers.state_out / multipliers.attention_out
            weights.place(state.out, mixer.out_proj, None)
            bias = _sum(bias, mixer.out_proj.sum_bias, state.out_factor)
    assert output is not None
    weights.place(target.o, output, bias)


def _describe_heads(weights: Weights, attention: Attention, target: AttentionParts, window: int | None) -> None:
    weights.place(target.qkv, attention.qkv_proj, attention.qkv_proj.bias)
    target.num_made, target.norms_values = attention.num_made, isinstance(attention, NormedValueAttention)
    norms = attention.head_norms or attention.whole_norms
    for name, norm in zip(("q_norm", "k_norm"), norms, strict=False):
        setattr(target, name, address(norm.weight))
    if attention.bare_eps is not None:
        target.q_norm = target.k_norm = weights.ones(attention.head_dim)
    target.has_whole_norms = bool(attention.whole_norms)
    if attention.sinks is not None:
        target.sinks = address(attention.sinks.weight)
    target.sight = SightParts(window or 0, isinstance(window, Chunk))


def _latents(weights: Weights, attention: LatentAttention) -> LatentParts:
    latent, norm = attention.latent, attention.kv_norm
    packed = [weights.heads(matrices) for matrices in attention.heads.take()]
    of_keys, of_values = (each.tiles for each in packed)
    described = LatentParts(
        to_keys=of_keys,
        to_values=of_values,
        kv_norm=address(norm.weight),
        q_norm=weight_of(attention.q_norm),
        kv_rank=latent.kv_rank,
        nope_dim=latent.nope_dim,
        value_dim=latent.value_dim,
        q_rank=latent.q_rank or 0,
        is_interleaved=latent.is_interleaved,
        norm_eps=norm.eps,
    )
    weights.place(described.inputs, attention.a_proj, attention.a_proj.bias)
    weights.place(described.queries, attention.q_proj, None)
    return described


def _sum(bias: Tensor | None, other: Tensor | None, factor: float) -> Tensor | None:
    """Return the bias of two products whose sum has another `factor` of the second."""
    if other is None:
        return bias
    return other * factor if bias is None else bias + other * factor
