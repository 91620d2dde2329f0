"""Rotary positions of a checkpoint, and their scalings, as config.json has them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..common.errors import ConfigError
from .config_fields import ConfigFields

RopeKind = Literal["default", "linear", "llama3", "yarn"]


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
    attention_factor: float = 1.0  # multiplies cos and sin (yarn)


def read_rope(fields: ConfigFields, max_model_len: int) -> RopeConfig:
    """Read the rotary positions. Raises ConfigError.

    `rope_parameters` holds everything in newer checkpoints; older ones have `rope_scaling` and a top-level theta.
    """
    scaling = fields.mapping("rope_parameters") or fields.mapping("rope_scaling") or ConfigFields(fields.path, {})
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10_000.0))
    kind = scaling.raw.get("rope_type") or scaling.raw.get("type") or "default"
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise scaling.refuse("partial_rotary_factor", "only rotary positions over the whole head are supported")
    if kind == "default":
        nested = [key for key, value in scaling.raw.items() if isinstance(value, dict)]
        if nested:
            raise ConfigError(f"{fields.path}: rotary parameters for each layer type ({nested}) are not supported")
        return RopeConfig(theta=theta)
    original = scaling.count("original_max_position_embeddings", max_model_len)
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=scaling.number("factor"), original_max_len=max_model_len)
    if kind == "llama3":
        return _llama3(scaling, theta, original)
    if kind == "yarn":
        return _yarn(scaling, theta, original, max_model_len)
    raise ConfigError(
        f"{fields.path}: rotary scaling {kind!r} is not supported; these are: default, linear, llama3, yarn"
    )


def _llama3(scaling: ConfigFields, theta: float, original: int) -> RopeConfig:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise scaling.refuse("low_freq_factor", f"must be below high_freq_factor = {high}")
    return RopeConfig(
        kind="llama3",
        theta=theta,
        factor=scaling.number("factor"),
        original_max_len=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(scaling: ConfigFields, theta: float, original: int, max_model_len: int) -> RopeConfig:
    factor = scaling.number("factor", max_model_len / original)
    if scaling.has("mscale") and scaling.has("mscale_all_dim"):
        default = _yarn_mscale(factor, scaling.number("mscale")) / _yarn_mscale(
            factor, scaling.number("mscale_all_dim")
        )
    else:
        default = _yarn_mscale(factor, 1.0)
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
