"""Fields of GGUF files that several architectures have beyond those that every one has."""

from __future__ import annotations

WINDOW = ("attention.sliding_window", "attention.sliding_window_pattern")
GROWING = ("attention.temperature_scale", "attention.temperature_length")  # queries, with their positions
EXPERTS = ("expert_count", "expert_used_count", "expert_feed_forward_length")
SHARED_SIZE = (*EXPERTS, "expert_shared_feed_forward_length")
ROUTING = (
    *SHARED_SIZE,
    "expert_gating_func",
    "expert_group_count",
    "expert_shared_count",
    "expert_weights_norm",
    "expert_weights_scale",
    "leading_dense_block_count",
)
MULTIPLIERS = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
