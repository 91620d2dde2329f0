"""Entries of the table that several families have in common, or that are long; `table.py` says what else each has."""

from __future__ import annotations

from dataclasses import replace

from .defaults import GEMMA4
from .experts import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    ERNIE,
    EXAONE,
    GEMMA_4_EXPERTS,
    LFM2_EXPERTS,
    LLAMA_4,
    MISTRAL_4,
    NEMOTRON_H_EXPERTS,
    SOLAR,
    ExpertTraits,
)
from .family import Family, MlpNames

# Heads and norms of GLM-4.
GLM4 = Family(
    name="glm",
    defaults={"attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-7},
    qkv_bias="attention_bias",
    fusion="mlp",
    has_partial_rope=True,
    has_neighbours=True,
)
ARCEE = Family(
    name="arcee",
    defaults={"hidden_act": "relu2", "rms_norm_eps": 1e-5},
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    mlp=MlpNames(gate=None),
)
ERNIE4 = Family(
    name="ernie4_5",
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": True},
    qkv_bias="use_bias",
    o_bias="use_bias",
    mlp_bias="use_bias",
    has_neighbours=True,
)
ERNIE4_MOE = replace(
    ERNIE4, name="ernie4_5_moe", defaults={"moe_num_shared_experts": 2, **ERNIE4.defaults}, experts=ERNIE
)
HUNYUAN_DENSE = Family(
    name="hunyuan_v1_dense",
    defaults={"rms_norm_eps": 1e-5},
    head_norms="turned",
    head_norm_names=("query_layernorm", "key_layernorm"),
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    has_alpha=True,
)
EXAONE4 = Family(
    name="exaone4",
    defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4},
    norms="behind",
    head_norms="head",
    windows="typed",
    unturned="beside windows",
)
EXAONE_MOE = replace(
    EXAONE4,
    name="exaone_moe",
    defaults={"num_shared_experts": 1, **EXAONE4.defaults},
    norms="before",
    experts=EXAONE,
)
SOLAR_OPEN = Family(
    name="solar_open",
    defaults={
        "head_dim": 128,
        "intermediate_size": 1280,  # of no layer: all have experts
        "moe_intermediate_size": 1280,
        "n_shared_experts": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
    },
    qkv_bias="attention_bias",
    experts=SOLAR,
)

# Layers without a window have heads of another size.
GEMMA4_TEXT = Family(
    name="gemma4_text",
    defaults=GEMMA4,
    norms="both",
    activation_key="hidden_activation",
    head_norms="head",
    norms_values=True,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    windows="typed",
    has_wide_layers=True,
    has_layer_factors=True,
    experts=GEMMA_4_EXPERTS,
    has_local_rope=True,
    scales_embeddings=True,
    has_score_scale=True,
)

# Some layers attend, the others are convolutions over the last few tokens.
LFM2 = Family(
    name="lfm2",
    defaults={
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256,
        "conv_L_cache": 3,
        "max_position_embeddings": 128_000,
        "norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    own_norm_names=("operator_norm", None, "ffn_norm", None),
    head_norms="head",
    head_norm_names=("q_layernorm", "k_layernorm"),
    output_name="out_proj",
    final_norm="embedding_norm",
    mlp=MlpNames(module="feed_forward", gate="w1", up="w3", down="w2", is_adjusted=True),
    states="short convolutions",
)
LFM2_MOE = replace(LFM2, name="lfm2_moe", mlp=LFM2.mlp._replace(is_adjusted=False), experts=LFM2_EXPERTS)

# Each layer attends and keeps a state, side by side.
FALCON_H1 = Family(
    name="falcon_h1",
    defaults={
        "mamba_d_state": 256,
        "mamba_n_heads": 128,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    },
    own_norm_names=("input_layernorm", None, "pre_ff_layernorm", None),
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    mlp=MlpNames(module="feed_forward"),
    final_norm="final_layernorm",
    states="mamba",
    attends_beside_states=True,
)

# Each layer is one block, and attention turns nothing by positions.
NEMOTRON_H = Family(
    name="nemotron_h",
    defaults={
        "head_dim": 128,
        "hidden_act": "relu2",
        "mamba_d_state": 128,
        "mamba_n_groups": 8,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    },
    own_norm_names=("norm", None, "norm", None),
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    mlp=MlpNames(module="mixer", gate=None),
    attention="mixer",
    has_lone_blocks=True,
    final_norm="norm_f",
    unturned="untyped",
    states="mamba",
    experts=NEMOTRON_H_EXPERTS,
)

# Of four layers three keep a state, one has gated attention.
QWEN_NEXT = Family(
    name="qwen3_next",
    defaults={
        "full_attention_interval": 4,
        "head_dim": 256,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "partial_rotary_factor": 0.25,
    },
    head_norms="head",
    norm_offset=1.0,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    has_partial_rope=True,
    has_attention_gates=True,
    states="grouped delta nets",
)

# Three of four layers attend in chunks, some have experts.
LLAMA4 = Family(
    name="llama4_text",
    defaults={
        "attention_chunk_size": 8192,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "head_dim": 128,
        "intermediate_size_mlp": 16384,
        "num_experts_per_tok": 1,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
    },
    head_norms="bare",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp=MlpNames(module="feed_forward", size="intermediate_size_mlp"),
    windows="chunks",
    has_neighbours=True,
    unturned="named",
    experts=LLAMA_4,
)

# Attention is over latents.
DEEPSEEK2 = Family(
    name="deepseek_v2",
    defaults={"n_shared_experts": 2},
    is_latent=True,
    mlp_bias="mlp_bias",
    experts=DEEPSEEK_V2,
)
DEEPSEEK3 = Family(name="deepseek_v3", defaults={"n_shared_experts": 1}, is_latent=True, experts=DEEPSEEK_V3)

# Attention is over latents, and all layers have experts.
MISTRAL4 = Family(
    name="mistral4",
    defaults={
        "kv_lora_rank": 256,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "q_lora_rank": 1024,
        "qk_nope_head_dim": 64,
    },
    is_latent=True,
    scales_queries=True,
    experts=MISTRAL_4,
)

# Experts are stacked, attention has sinks.
GPT_OSS = Family(
    name="gpt_oss",
    defaults={
        "attention_bias": True,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "sliding_window": 128,
        "sliding_window_pattern": 2,
    },
    experts=ExpertTraits(gate="router", normalised=True, is_stacked=True),
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    has_sinks=True,
    windows="typed",
)
