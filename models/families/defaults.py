"""Families have these numbers where a config.json does not tell them: transformers' classes have the same."""

from __future__ import annotations

GEMMA: dict[str, object] = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
GEMMA3: dict[str, object] = GEMMA | {
    "max_position_embeddings": 131_072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rope_local_base_freq": 10_000.0,
    "rope_theta": 1_000_000.0,
    "sliding_window_pattern": 6,
    "vocab_size": 262_208,
}
GEMMA4: dict[str, object] = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 1,  # queries are normed
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "vocab_size": 262_144,
}
COHERE2: dict[str, object] = {
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "tie_word_embeddings": True,
}
OLMO3: dict[str, object] = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}
