"""A whole model is described here as C++ takes it: its sizes, rotations and factors. Not its layers, nor its head."""

from __future__ import annotations

from ...models.parts.activation import Activation
from ...models.parts.rank_counts import heads_of_rank
from ...models.parts.uneven_heads import Heads
from ..nn.decoder import Decoder
from ..nn.rotary import RotaryEmbedding
from .described import GrowthParts, HeadParts, Model
from .packing import address

_ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "relu2")  # as the C++ `Activation` counts them


def outline(decoder: Decoder) -> Model:
    """Describe a rank's part of a model, all but what layers and the head are."""
    config = decoder.config
    model = Model(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        has_neighbours=config.rope.has_neighbours,
        norms_turned=config.family.head_norms in ("turned", "bare"),
        has_gates=config.family.has_attention_gates,
        activation=_ACTIVATIONS.index(config.activation),
        is_gated=config.family.mlp.gate is not None,
        takes_mean_off=config.family.has_layer_norms,
        norm_eps=config.rms_norm_eps,
        norm_offset=config.family.norm_offset,
        embedding_factor=decoder.multiplier,
        mixed_factor=config.residual_multiplier * config.multipliers.attention_out,
        fed_factor=config.residual_multiplier * config.multipliers.fed,
        gate_factor=config.multipliers.gate,
        score_cap=config.score_cap or 0.0,
        num_ranks=decoder.head.rows.comm.size,
    )
    uneven, own = config.uneven, Heads(config.num_kv_heads, config.head_dim)
    model.heads[0] = _heads(decoder, own if uneven is None else uneven.wide, decoder.rotary)
    if decoder.local_rotary is not None:
        model.heads[1] = _heads(decoder, own if uneven is None else uneven.narrow, decoder.local_rotary)
    model.first_token, model.num_tokens = decoder.embedding.start, decoder.embedding.stop - decoder.embedding.start
    return model


def _heads(decoder: Decoder, heads: Heads, rotary: RotaryEmbedding) -> HeadParts:
    """Describe a rank's heads of some layers, with what turns them."""
    config, num_ranks, rope = decoder.config, decoder.head.rows.comm.size, rotary.rope
    num_qo = config.num_qo_heads // num_ranks
    return HeadParts(
        num_qo=num_qo,
        num_kv=num_qo if config.latent is not None else heads_of_rank(heads.num_kv, num_ranks),
        dim=heads.dim,
        rotary_dim=2 * len(rotary.inv_freq),
        are_latents=config.latent is not None,
        rope_factor=rotary.attention_factor,
        query_factor=1.0 if config.score_scale is None else config.score_scale * heads.dim**0.5,
        growth=GrowthParts(rope.query_beta, rope.query_len, rope.query_shift),
        inv_freq=address(rotary.inv_freq),
    )
