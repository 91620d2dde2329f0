"""A model that the C++ for CPUs (engine/cpu/native) has no code for is computed by torch, by plain numbers."""

from __future__ import annotations

from .config import ModelConfig


def not_in_native(config: ModelConfig) -> list[str]:
    """Name each part of a model that C++ has not; nothing: it computes the model, in bfloat16."""
    family = config.family
    has = {
        "mixtures of experts": config.experts is not None,
        f"norms {family.norms} blocks": family.norms != "before",
        "norms of one more than their weights": family.norm_offset != 0.0,
        "norms of whole projections": family.head_norms == "whole",
        "attention sinks": family.has_sinks,
        "two rotary embeddings": config.local_rope is not None,
        "rotary embeddings of a part of a head": config.rope.fraction != 1.0,
        config.activation: config.activation != "silu",
        "scaled embeddings": config.embedding_multiplier != 1.0,
        "a scaled residual stream": config.residual_multiplier != 1.0,
        "scaled scores": config.score_scale is not None,
        "capped scores": config.score_cap is not None,
        "scaled logits": config.logits_divisor != 1.0 or config.logits_cap is not None,
    }
    return [name for name, is_there in has.items() if is_there]
