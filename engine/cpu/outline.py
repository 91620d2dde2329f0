"""A whole model is described here as C++ takes it: its sizes, rotations and factors. Not its layers, nor its head."""

from __future__ import annotations

from ...models.parts.activation import Activation
from ...models.parts.rope import RopeConfig
from ..nn.decoder import Decoder
from .described import SIZES, GrowthParts, Model
from .packing import address

_SPLIT = {"num_qo_heads", "num_kv_heads"}  # over the ranks
_ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "relu2")  # as the C++ `Activation` counts them
_OF_LAYERS = {"num_layers", "intermediate_size"}  # which layers C++ has is not the config's to say


def outline(decoder: Decoder) -> Model:
    """Describe a rank's part of a model, all but what layers and the head are."""
    config, num_ranks = decoder.config, decoder.head.rows.comm.size
    scale = 1.0 if config.score_scale is None else config.score_scale * config.head_dim**0.5
    model = Model(
        rotary_dim=2 * len(decoder.rotary.inv_freq),
        has_neighbours=config.rope.has_neighbours,
        norms_turned=config.family.head_norms in ("turned", "bare"),
        has_gates=config.family.has_attention_gates,
        activation=_ACTIVATIONS.index(config.activation),
        is_gated=config.family.mlp.gate is not None,
        takes_mean_off=config.family.has_layer_norms,
        norm_eps=config.rms_norm_eps,
        norm_offset=config.family.norm_offset,
        rope_factor=decoder.rotary.attention_factor,
        embedding_factor=decoder.multiplier,
        query_factor=scale,
        mixed_factor=config.residual_multiplier * config.multipliers.attention_out,
        fed_factor=config.residual_multiplier * config.multipliers.fed,
        gate_factor=config.multipliers.gate,
        growth=_growth(config.rope),
        score_cap=config.score_cap or 0.0,
        num_ranks=num_ranks,
    )
    if decoder.local_rotary is not None:
        model.local_growth = _growth(decoder.local_rotary.rope)
        model.local_rope_factor = decoder.local_rotary.attention_factor
        model.local_inv_freq = address(decoder.local_rotary.inv_freq)
    for name in set(SIZES) - _OF_LAYERS:
        setattr(model, name, getattr(config, name) // (num_ranks if name in _SPLIT else 1))
    if config.latent is not None:
        model.num_kv_heads = model.num_qo_heads
    model.first_token, model.num_tokens = decoder.embedding.start, decoder.embedding.stop - decoder.embedding.start
    model.inv_freq = address(decoder.rotary.inv_freq)
    return model


def _growth(rope: RopeConfig) -> GrowthParts:
    return GrowthParts(rope.query_beta, rope.query_len, rope.query_shift)
