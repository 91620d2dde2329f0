"""Layers of one block each, a mixer or a feed-forward behind a norm of its own: Nemotron-H's config.json tells them.

    M  Mamba's second kind    *  attention    -  a dense feed-forward    E  a mixture of experts

(NVIDIA 2025, "Nemotron-H", section 2.1.) What it says in words of its own is said again in those of other families, so
that what reads these reads it, too.
"""

from __future__ import annotations

from typing import Literal

from .config_fields import ConfigFields

Block = Literal["mixer", "feed-forward"]

FEED_FORWARDS = frozenset({"mlp", "moe"})  # among the types of layers
_STATES, _KEYS = "linear_attention", "full_attention"
_OF_PATTERN = {"M": _STATES, "*": _KEYS, "-": "mlp", "E": "moe"}
_TYPES = {"mamba": _STATES, "attention": _KEYS} | {kind: kind for kind in _OF_PATTERN.values()}
_PATTERN, _LISTS = "hybrid_override_pattern", ("layers_block_type", "layer_types")
_WORDS = {
    "attention_head_dim": "head_dim",
    "conv_kernel": "mamba_d_conv",
    "layer_norm_epsilon": "rms_norm_eps",
    "mamba_head_dim": "mamba_d_head",
    "mamba_num_heads": "mamba_n_heads",
    "mlp_hidden_act": "hidden_act",
    "n_groups": "mamba_n_groups",
    "ssm_state_size": "mamba_d_state",
    "use_bias": "mamba_proj_bias",
    "use_conv_bias": "mamba_conv_bias",
}


def in_common_words(fields: ConfigFields) -> ConfigFields:
    """Return what is told of a model of such layers, with all that other families have other words for.

    Raises ConfigError for types of layers that are unknown, and for what nothing here computes.
    """
    if fields.raw.get("mamba_hidden_act", "silu") not in ("silu", "swish"):
        raise fields.refuse("mamba_hidden_act", "only silu is supported")
    types = _types(fields)
    if fields.has("num_hidden_layers") and fields.count("num_hidden_layers") != len(types):
        raise fields.refuse("num_hidden_layers", f"{len(types)} layers have a type")
    told = dict(fields.raw) | {common: fields.raw[own] for own, common in _WORDS.items() if fields.has(own)}
    told |= {
        "num_hidden_layers": len(types),
        "layer_types": types,
        "mlp_layer_types": ["sparse" if kind == "moe" else "dense" for kind in types],
        "mamba_d_ssm": fields.count("mamba_num_heads") * fields.count("mamba_head_dim"),
    }
    if "moe" not in types:
        told["n_routed_experts"] = 0
    return ConfigFields(fields.path, told)


def _types(fields: ConfigFields) -> list[str]:
    """Return the type of each layer."""
    key = fields.told((*_LISTS, _PATTERN))
    told, known = fields.raw.get(key), _OF_PATTERN if key == _PATTERN else _TYPES
    types = list(told) if isinstance(told, str if key == _PATTERN else list) else []
    if not types or not all(isinstance(kind, str) and kind in known for kind in types):
        raise fields.refuse(key, f"each layer must be one of {' '.join(known)}")
    return [known[kind] for kind in types]


def read_blocks(fields: ConfigFields) -> tuple[Block, ...]:
    """Return the one block that each layer has, as `in_common_words` tells their types."""
    types = fields.raw["layer_types"]
    assert isinstance(types, list)
    return tuple("feed-forward" if kind in FEED_FORWARDS else "mixer" for kind in types)
