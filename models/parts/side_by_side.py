"""Layers that attend and keep a state, side by side, as Falcon-H1's config.json tells them (TII 2025, "Falcon-H1", 2).

    mixer          attention * attention_out + state * state_out, both of the same tokens behind the same norm
    feed-forward   (activation(gate * gate's factor) * up), down, * its own factor

All factors are config.json's, which were tuned on a small model and carried over to large ones (its section 3.2.3).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...common.errors import ConfigError
from ..families.family import Family
from .config_fields import ConfigFields

_NUM_PROJECTED = 5


@dataclass(slots=True, frozen=True, kw_only=True)
class Multipliers:
    """Numbers within such a layer are multiplied by these; of other families all are 1."""

    attention_in: float = 1.0
    attention_out: float = 1.0
    state_in: float = 1.0
    state_out: float = 1.0
    # Of a token's gates, values, what these are written by, what they are read by, and steps; nothing: as they are.
    projected: tuple[float, ...] = ()
    gate: float = 1.0  # of a feed-forward, before its activation
    fed: float = 1.0  # of what a feed-forward yields


def read_multipliers(fields: ConfigFields, family: Family) -> Multipliers:
    """Return what multiplies numbers in a layer. Raises ConfigError, also for layers that nothing here computes."""
    if not family.attends_beside_states:
        return Multipliers()
    _check_layers(fields)
    gate, fed = _numbers(fields, "mlp_multipliers", 2) or (1.0, 1.0)
    return Multipliers(
        attention_in=fields.number("attention_in_multiplier", 1.0),
        attention_out=fields.number("attention_out_multiplier", 1.0),
        state_in=fields.number("ssm_in_multiplier", 1.0),
        state_out=fields.number("ssm_out_multiplier", 1.0),
        projected=_numbers(fields, "ssm_multipliers", _NUM_PROJECTED),
        gate=gate,
        fed=fed,
    )


def read_outer_factors(fields: ConfigFields, head_dim: int) -> dict[str, float]:
    """Return those of `parts/factors.py`: around the layers, and of scores, as keys are multiplied by one."""
    return {
        "embedding_multiplier": fields.number("embedding_multiplier", 1.0),
        "logits_divisor": 1 / fields.number("lm_head_multiplier", 1.0),
        "score_scale": head_dim**-0.5 * fields.number("key_multiplier", 1.0),
    }


def _numbers(fields: ConfigFields, key: str, count: int) -> tuple[float, ...]:
    return fields.numbers(key, count) if fields.has(key) else ()


def _check_layers(fields: ConfigFields) -> None:
    if fields.has("attn_layer_indices"):
        raise fields.refuse("attn_layer_indices", "layers that keep a state and do not attend are not supported here")
    if not fields.flag("mamba_use_mlp", default=True):
        raise fields.refuse("mamba_use_mlp", "layers without a feed-forward are not supported here")
    biases = [fields.flag(key, default=False) for key in ("mamba_proj_bias", "projectors_bias")]
    if biases[0] != biases[1]:
        raise ConfigError(
            f"{fields.path}: mamba_proj_bias and projectors_bias: a bias of one product of a state is not supported"
        )
