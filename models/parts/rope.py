"""Rotary positions of a checkpoint and their scalings, and which layers turn none or see a window of keys alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from ...common.errors import ConfigError
from ..families.family import Family
from .chunks import read_chunks
from .config_fields import ConfigFields

RopeKind = Literal["default", "linear", "llama3", "longrope", "proportional", "yarn", "none"]  # none: angles are 0

_LAYER_TYPES = ("full_attention", "sliding_attention")
_ORIGINAL = "original_max_position_embeddings"
_KEEPING_ORIGINAL = ("llama3", "longrope", "su", "yarn")
_BESIDE_SCALING = ("rope_theta", "partial_rotary_factor")


@dataclass(slots=True, frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions; the fields after `factor` belong to the scaling kinds that use them."""

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_len: int = 0  # positions that the unscaled model was trained on
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # multiplies cos and sin (yarn, longrope)
    short_factors: tuple[float, ...] = ()  # of each frequency, up to the original length (longrope)
    long_factors: tuple[float, ...] = ()  # of each frequency, beyond it (longrope)
    fraction: float = 1.0  # of a head that is turned, from its beginning on
    turned_share: float = 1.0  # of pairs, the fastest; the others' angles are 0 (proportional)
    has_neighbours: bool = False  # a pair's two numbers are neighbours in a head, not half a head apart
    query_beta: float = 0.0  # queries are 1 + query_beta * log(1 + position // query_len) times as large
    query_len: int = 1
    query_shift: int = 0  # added to a position before

    def is_long(self, max_model_len: int) -> bool:
        """Tell whether all positions are turned as those of long sequences.

        One choice for all that a worker serves: keys that were turned otherwise could not be shared by a short sequence
        and a long one, nor by a sequence and what it grows into.
        """
        return self.kind == "longrope" and max_model_len > self.original_max_len


def read_max_len(fields: ConfigFields) -> int:
    """Return the positions that the checkpoint declares, as far as they are turned as here. Raises ConfigError.

    Dual chunk attention (Qwen2.5-1M) counts positions anew in each chunk, but for those that the next one begins with.
    Within the first chunk it is none.
    """
    declared = fields.count("max_position_embeddings", 2048)
    if (chunks := fields.mapping("dual_chunk_attention_config")) is None:
        return declared
    size, overlap = chunks.count("chunk_size", 8192), chunks.count("local_size", 1024)
    if overlap >= size:
        raise chunks.refuse("local_size", f"must be below chunk_size = {size}")
    return min(declared, size - overlap)


def read_ropes(
    fields: ConfigFields, family: Family, max_model_len: int, head_dim: int, *, has_windows: bool
) -> tuple[RopeConfig, RopeConfig | None]:
    """Read the rotary positions, and those of local layers where they are others. Raises ConfigError.

    `has_windows`: the size of a window is told, whether layers have it or not.
    """
    scaling = rotary_fields(fields)
    theta = fields.number("rope_theta", 10_000.0)
    if not family.has_local_rope:
        rope = _read_rope(fields, scaling, family, theta, max_model_len, head_dim)
        unturned = RopeConfig(kind="none", has_neighbours=family.has_neighbours)
        if family.unturned == "without window" or (family.unturned == "beside windows" and has_windows):
            return unturned, rope
        if family.unturned == "untyped" and fields.raw.get("position_embedding_type") != "rope":
            return unturned, None
        return rope, _growing(fields, unturned) if family.unturned == "named" else None
    local_theta = fields.number("rope_local_base_freq", theta)
    if scaling.raw.keys() & set(_LAYER_TYPES):
        full, local = (scaling.mapping(name) or ConfigFields(fields.path, {}) for name in _LAYER_TYPES)
    else:
        full, local = scaling, ConfigFields(fields.path, {})
    return (
        _read_rope(fields, full, family, theta, max_model_len, head_dim),
        _read_rope(fields, local, family, local_theta, max_model_len, head_dim),
    )


def rotary_fields(fields: ConfigFields) -> ConfigFields:
    """Return what config.json says of rotary positions, for all layers or for each type of layer. Raises ConfigError.

    `rope_parameters` holds everything in newer checkpoints; older ones have `rope_scaling` and a top-level theta. Where
    there are both somebody added the scaling, as model cards advise: it goes first, as in `transformers`.
    """
    told, added = (fields.mapping(key) or ConfigFields(fields.path, {}) for key in ("rope_parameters", "rope_scaling"))
    if not added.raw or not told.raw:
        return added if added.raw else told
    if (full := told.mapping(_LAYER_TYPES[0])) is not None:
        return ConfigFields(fields.path, {**told.raw, _LAYER_TYPES[0]: _rescaled(full, added)})
    return ConfigFields(fields.path, _rescaled(told, added))


def _rescaled(told: ConfigFields, added: ConfigFields) -> dict[str, object]:
    return {key: told.raw[key] for key in _BESIDE_SCALING if told.has(key)} | dict(added.raw)


def _read_rope(
    fields: ConfigFields, scaling: ConfigFields, family: Family, theta: float, max_model_len: int, head_dim: int
) -> RopeConfig:
    theta = scaling.number("rope_theta", theta)
    fraction = scaling.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if family.has_partial_rope and fields.has("rotary_dim") and not scaling.has("partial_rotary_factor"):
        fraction = fields.count("rotary_dim") / head_dim  # MiniMax-M2's word
    if family.is_latent and _is_of_latents(fields, fraction, head_dim):
        fraction = 1.0
    kind, turned_share = scaling.raw.get("rope_type") or scaling.raw.get("type") or "default", fraction
    if kind == "proportional":
        fraction = 1.0
    if fraction != 1.0 and not family.has_partial_rope:
        where = scaling if scaling.has("partial_rotary_factor") else fields
        raise where.refuse("partial_rotary_factor", "only rotary positions over the whole head are supported")
    original = scaling.count(_ORIGINAL, max_model_len)
    if kind in _KEEPING_ORIGINAL and not family.has_local_rope:  # beside the scaling it goes first, as in transformers
        original = fields.count(_ORIGINAL, original)
    match kind:
        case (
            "default" | "mrope"
        ):  # of text a position's three numbers are one (Wang et al. 2024, Qwen2-VL, section 2.1)
            nested = [key for key, value in scaling.raw.items() if isinstance(value, dict)]
            if nested:
                raise ConfigError(f"{fields.path}: rotary parameters for each layer type ({nested}) are not supported")
            rope = RopeConfig(theta=theta)
        case "dynamic" if family.has_alpha and scaling.has("alpha"):  # a stretched base, for all lengths
            rope = RopeConfig(theta=_stretched(scaling, theta, head_dim))
        case "linear":
            factor = scaling.number("factor")
            rope = RopeConfig(kind="linear", theta=theta, factor=factor, original_max_len=max_model_len)
        case "proportional":
            factor = scaling.number("factor", 1.0)
            rope = RopeConfig(kind="proportional", theta=theta, factor=factor, turned_share=turned_share)
        case "llama3":
            rope = _llama3(scaling, theta, original)
        case "yarn":
            rope = _yarn(scaling, theta, original, max_model_len)
        case "longrope" | "su":
            rope = _longrope(scaling, theta, original, max_model_len, int(head_dim * fraction) // 2)
        case _:
            raise ConfigError(
                f"{fields.path}: rotary scaling {kind!r} is not supported; "
                "these are: default, linear, llama3, longrope, proportional, yarn"
            )
    rope = replace(rope, fraction=fraction, has_neighbours=family.has_neighbours)
    beta = "llama_4_scaling_beta"
    if not scaling.has(beta):
        return rope
    if not family.scales_queries:
        raise scaling.refuse(beta, "queries that grow with their positions are not supported in this family")
    return replace(rope, query_beta=scaling.number(beta), query_len=original)


def _is_of_latents(fields: ConfigFields, fraction: float, rope_dim: int) -> bool:
    """Tell whether a fraction is of a head's whole query, with the part that latents turn: all that is turned here."""
    return math.isclose(fraction * (fields.count("qk_nope_head_dim", 128) + rope_dim), rope_dim)


def _growing(fields: ConfigFields, rope: RopeConfig) -> RopeConfig:
    """Return what turns nothing, with queries that grow with their positions where Llama 4's config.json says so."""
    if not fields.raw.get("attn_temperature_tuning"):
        return rope
    return replace(rope, query_beta=fields.number("attn_scale"), query_len=fields.count("floor_scale"), query_shift=1)


def _stretched(scaling: ConfigFields, theta: float, head_dim: int) -> float:
    """Return the base by Hunyuan's fixed alpha (transformers: `compute_ntk_alpha_rope_parameters`)."""
    try:
        return float(theta * scaling.number("alpha") ** (head_dim / (head_dim - 2)))
    except ZeroDivisionError:
        raise scaling.refuse("alpha", f"gives no base for heads of {head_dim}") from None


def _llama3(scaling: ConfigFields, theta: float, original: int) -> RopeConfig:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low > high:
        raise scaling.refuse("low_freq_factor", f"must not be above high_freq_factor = {high}")
    return RopeConfig(
        kind="llama3",
        theta=theta,
        factor=scaling.number("factor"),
        original_max_len=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _longrope(scaling: ConfigFields, theta: float, original: int, max_model_len: int, count: int) -> RopeConfig:
    factor = scaling.number("factor", max_model_len / original)
    default = 1.0
    if factor > 1 and not scaling.has("attention_factor"):
        if original == 1:
            raise ConfigError(f"{scaling.path}: {_ORIGINAL} = 1: must be at least 2, or attention_factor be told")
        default = math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeConfig(
        kind="longrope",
        theta=theta,
        original_max_len=original,
        attention_factor=scaling.number("attention_factor", default),
        short_factors=scaling.numbers("short_factor", count),
        long_factors=scaling.numbers("long_factor", count),
    )


def _yarn(scaling: ConfigFields, theta: float, original: int, max_model_len: int) -> RopeConfig:
    factor = scaling.number("factor", max_model_len / original)
    if theta == 1.0:
        raise ConfigError(f"{scaling.path}: rope_theta = 1: yarn stretches by frequency, and all would be alike")
    if scaling.raw.get("mscale") and scaling.raw.get("mscale_all_dim"):  # 0 says, like null, that there is none
        default = _yarn_mscale(factor, scaling.number("mscale")) / _yarn_mscale(
            factor, scaling.number("mscale_all_dim")
        )
    else:
        default = _yarn_mscale(factor, 1.0)
    default *= scaling.number("attn_factor", 1.0)  # vLLM's word, as of DeepSeek-R1-0528-Qwen3-8B; transformers has none
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max_len=original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", default=True),
        attention_factor=scaling.number("attention_factor", default),
    )


def _yarn_mscale(factor: float, mscale: float) -> float:
    """Return the temperature of YaRN (Peng et al. 2023, section 3.4), as a factor on cos and sin."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def read_windows(fields: ConfigFields, family: Family) -> tuple[int | None, ...]:
    """Return of each layer the keys that a token sees, itself included; None: all. Raises ConfigError."""
    num_layers = fields.count("num_hidden_layers")
    if family.windows == "chunks":
        return read_chunks(fields)
    if family.windows == "none" or not fields.has("sliding_window"):
        return (None,) * num_layers
    if family.windows in ("flagged", "every flagged") and not fields.flag("use_sliding_window", default=False):
        return (None,) * num_layers
    window = fields.count("sliding_window")
    if family.windows in ("every", "every flagged"):
        return (window,) * num_layers
    return tuple(window if is_sliding else None for is_sliding in _sliding_layers(fields, family, num_layers))


def _sliding_layers(fields: ConfigFields, family: Family, num_layers: int) -> list[bool]:
    layer_types = fields.raw.get("layer_types")
    if layer_types is None and family.windows == "typed":
        pattern = fields.count("sliding_window_pattern")
        return [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    if layer_types is None and family.unturned == "named":
        return list(read_unturned(fields, family))
    if layer_types is None:
        first = fields.raw.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise fields.refuse("max_window_layers", "must be a whole number")
        return [layer >= first for layer in range(num_layers)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(layer_types, list) or len(layer_types) != num_layers or not all(t in known for t in layer_types):
        raise fields.refuse("layer_types", f"must name one of {known} for each of {num_layers} layers")
    return [kind == "sliding_attention" for kind in layer_types]


def read_unturned(fields: ConfigFields, family: Family) -> tuple[bool, ...]:
    """Return of each layer whether it turns nothing by positions; nothing: all turn. Raises ConfigError.

    `no_rope_layers` has a 1 for each layer that turns; where it is left out, each `no_rope_layer_interval`th does not.
    """
    if family.unturned != "named":
        return ()
    num_layers, turned = fields.count("num_hidden_layers"), fields.raw.get("no_rope_layers")
    if turned is None:
        step = fields.count("no_rope_layer_interval")
        return tuple((layer + 1) % step == 0 for layer in range(num_layers))
    if not isinstance(turned, list) or len(turned) < num_layers or not all(each in (0, 1) for each in turned):
        raise fields.refuse("no_rope_layers", f"must have 0 or 1 for each of {num_layers} layers")
    return tuple(not each for each in turned[:num_layers])
