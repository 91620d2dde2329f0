"""Small checkpoints whose layers keep states, of heads that fill vectors, as C++ wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...transformers_checkpoints import FALCON_H1, NEMOTRON_H, NEMOTRON_H_MOE, write_state_models

EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
_CONVOLUTIONS: dict[str, Any] = {"layer_types": ["conv", "full_attention", "conv", "conv"]}
_MAMBA: dict[str, Any] = {
    "layer_types": ["mamba", "attention", "mamba", "mamba"],
    "mamba_n_heads": 4,
    "mamba_d_state": 48,
    "shared_intermediate_size": 48,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.7,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
}
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5": ("Qwen3_5Text", {}),
    "qwen3.5, as many keys as values": (
        "Qwen3_5Text",
        {"linear_num_key_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 48},
    ),
    "qwen3.5, a longer convolution": ("Qwen3_5Text", {"linear_conv_kernel_dim": 6, "tie_word_embeddings": True}),
    "qwen3.5, heads of its size": (
        "Qwen3_5Text",
        {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
        | {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "head_dim": 256},
    ),
    "qwen3 next, dense, a state behind all": (
        "Qwen3Next",
        EXPERTS | {"mlp_only_layers": [0, 1, 2, 3, 4], "num_hidden_layers": 5},
    ),
    "lfm2": ("Lfm2", _CONVOLUTIONS),
    "lfm2, biases, a longer convolution": ("Lfm2", _CONVOLUTIONS | {"conv_bias": True, "conv_L_cache": 5}),
    "granite4": ("GraniteMoeHybrid", _MAMBA),
    "granite4, groups of small heads, biases, positions": (
        "GraniteMoeHybrid",
        _MAMBA
        | {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_proj_bias": True}
        | {"mamba_conv_bias": False, "position_embedding_type": "rope"},
    ),
    "granite4, steps within limits": ("GraniteMoeHybrid", _MAMBA | {"time_step_limit": [0.6, 0.8]}),
    "granite4, heads of its size": (
        "GraniteMoeHybrid",
        _MAMBA | {"mamba_n_heads": 2, "mamba_d_head": 64, "mamba_d_state": 128},
    ),
    "nemotron h": ("NemotronH", NEMOTRON_H),
    "falcon h1": ("FalconH1", FALCON_H1),
    "falcon h1, normed before gates, biases": (
        "FalconH1",
        FALCON_H1
        | {"mamba_rms_norm": True, "mamba_norm_before_gate": True, "mamba_n_groups": 2, "mlp_bias": True}
        | {"mamba_proj_bias": True, "projectors_bias": True, "attention_bias": True},
    ),
    "falcon h1, normed behind gates": (
        "FalconH1",
        FALCON_H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": False},
    ),
}
SPARSE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5 moe": ("Qwen3_5MoeText", EXPERTS),
    "qwen3 next, some dense": ("Qwen3Next", EXPERTS | {"mlp_only_layers": [1], "num_hidden_layers": 5}),
    "lfm2 moe": ("Lfm2Moe", _CONVOLUTIONS | EXPERTS | {"num_dense_layers": 1}),
    "nemotron h moe": ("NemotronH", NEMOTRON_H_MOE),
    "nemotron h moe, narrower rows": ("NemotronH", NEMOTRON_H_MOE | {"moe_latent_size": 40}),
    "granite4 moe": ("GraniteMoeHybrid", _MAMBA | {"num_local_experts": 8, "num_experts_per_tok": 3}),
}
VARIANTS = DENSE | SPARSE


def write_states(root: Path, variants: dict[str, tuple[str, dict[str, Any]]]) -> Path:
    """Write each into a folder of its name, long enough for attention that is cut into parts."""
    return write_state_models(root, variants, head_dim=64, max_position_embeddings=4096)
