"""A model that the C++ for CPUs (engine/cpu/native) has no code for is computed by torch, by plain numbers."""

from __future__ import annotations

from .config import ModelConfig


def not_in_native(config: ModelConfig) -> list[str]:
    """Name each part of a model that C++ has not; nothing: it computes the model, in bfloat16."""
    family, turned = config.family, int(config.head_dim * config.rope.fraction)
    has = {
        "experts in such a residual stream": config.experts is not None
        and (family.norms != "before" or config.residual_multiplier != 1.0),
        "stacked experts": config.experts is not None and config.experts.is_stacked,
        "norms behind blocks alone": family.norms == "behind",
        "norms of whole projections": family.head_norms == "whole",
        "attention sinks": family.has_sinks,
        "latent attention": config.latent is not None,
        "so small a turned part of heads": config.rope.fraction != 1.0 and turned % 16 != 0,
        "capped scores": config.score_cap is not None,
    }
    return [name for name, is_there in has.items() if is_there]
