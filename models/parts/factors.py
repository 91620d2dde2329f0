"""config.json tells what multiplies, or bounds, the numbers that flow through the layers."""

from __future__ import annotations

import math

from ..families.family import Family
from .config_fields import ConfigFields
from .latent import LatentConfig
from .side_by_side import read_outer_factors


def read_factors(
    fields: ConfigFields, family: Family, hidden_size: int, latent: LatentConfig | None
) -> dict[str, float]:
    """Return the fields of `ModelConfig` that are such numbers, of those that are not as usual. Raises ConfigError."""
    found: dict[str, float] = {}
    if family.scales_embeddings:
        found["embedding_multiplier"] = math.sqrt(hidden_size)
    if family.has_multipliers:
        for name in ("embedding_multiplier", "residual_multiplier"):
            found[name] = fields.number(name, 1.0)
        found["logits_divisor"] = fields.number("logits_scaling", 1.0)
        found["score_scale"] = fields.number("attention_multiplier", 1.0)
    if family.attends_beside_states:
        head_dim = fields.count("head_dim", hidden_size // fields.count("num_attention_heads"))
        found |= read_outer_factors(fields, head_dim)
    if family.has_logit_scale:
        found["logits_divisor"] = 1 / fields.number("logit_scale")
    if latent is not None:
        found["score_scale"] = latent.score_scale
    if family.has_score_scale:
        found["score_scale"] = fields.number("query_pre_attn_scalar") ** -0.5
        caps = {"score_cap": "attn_logit_softcapping", "logits_cap": "final_logit_softcapping"}
        found |= {name: fields.number(key) for name, key in caps.items() if fields.has(key)}
    return found
