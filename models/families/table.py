"""The families of models that run: one decoder, and a line for each family that says how it differs from it.

A family of known parts takes its entry in FAMILIES and nothing else. What one needs that no other has is a block
(`engine/nn/blocks.py`), and a field of `Family` that chooses it.
"""

from __future__ import annotations

from dataclasses import replace

from .experts import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DOTS_1,
    ERNIE,
    EXAONE,
    GLM_4,
    MINIMAX_M2,
    MIXTRAL,
    SOLAR_OPEN,
    ExpertTraits,
)
from .family import Family, MlpNames

_GEMMA: dict[str, object] = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA3: dict[str, object] = _GEMMA | {
    "max_position_embeddings": 131_072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rope_local_base_freq": 10_000.0,
    "rope_theta": 1_000_000.0,
    "sliding_window_pattern": 6,
    "vocab_size": 262_208,
}


# Heads and norms of GLM-4.
_GLM4 = Family(
    name="glm",
    defaults={"attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-7},
    qkv_bias="attention_bias",
    fusion="mlp",
    has_partial_rope=True,
    has_neighbours=True,
)
_ERNIE = Family(
    name="ernie4_5",
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": True},
    qkv_bias="use_bias",
    o_bias="use_bias",
    mlp_bias="use_bias",
    has_neighbours=True,
)
_EXAONE4 = Family(
    name="exaone4",
    defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4},
    norms="behind",
    head_norms="head",
    windows="typed",
    unturned="without window",
)


FAMILIES = {
    "LlamaForCausalLM": Family(name="llama", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "SmolLM3ForCausalLM": Family(
        name="smollm3",
        defaults={"no_rope_layer_interval": 4, "rope_theta": 2_000_000.0, "tie_word_embeddings": True},
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        windows="flagged",
        unturned="named",
    ),
    "SeedOssForCausalLM": Family(
        name="seed_oss",
        defaults={"attention_bias": True, "head_dim": 128},
        qkv_bias="attention_bias",
        o_bias="attention_out_bias",
        mlp_bias="mlp_bias",
    ),
    "MistralForCausalLM": Family(name="mistral", defaults={"sliding_window": 4096}, windows="every"),
    "Ministral3ForCausalLM": Family(name="ministral3", windows="every", scales_queries=True),
    "Qwen2ForCausalLM": Family(name="qwen2", defaults={"sliding_window": 4096}, qkv_bias=True, windows="flagged"),
    "Qwen3ForCausalLM": Family(
        name="qwen3",
        defaults={"head_dim": 128, "sliding_window": 4096},
        head_norms="head",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        windows="flagged",
    ),
    "MixtralForCausalLM": Family(
        name="mixtral",
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
        windows="every",
        experts=MIXTRAL,
    ),
    "MiniMaxM2ForCausalLM": Family(
        name="minimax_m2",
        defaults={"head_dim": 128, "rope_theta": 5_000_000.0},
        head_norms="whole",
        has_partial_rope=True,
        experts=MINIMAX_M2,
    ),
    "Qwen3MoeForCausalLM": Family(
        name="qwen3_moe",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        defaults={"sliding_window": 4096},
        head_norms="head",
        windows="every flagged",
        experts=ExpertTraits(),
    ),
    "OlmoeForCausalLM": Family(
        name="olmoe",
        defaults={"rms_norm_eps": 1e-5},
        head_norms="whole",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        experts=ExpertTraits(),
    ),
    "Glm4MoeForCausalLM": Family(
        name="glm4_moe",
        defaults={"n_shared_experts": 1, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5},
        head_norms="flagged",
        qkv_bias="attention_bias",
        has_partial_rope=True,
        experts=GLM_4,
    ),
    "Glm4MoeLiteForCausalLM": Family(
        name="glm4_moe_lite",
        defaults={
            "n_shared_experts": 1,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 192,
            "rms_norm_eps": 1e-5,
            "routed_scaling_factor": 1.8,
            "v_head_dim": 256,
        },
        is_latent=True,
        experts=GLM_4,
    ),
    "DeepseekV2ForCausalLM": Family(name="deepseek_v2", is_latent=True, mlp_bias="mlp_bias", experts=DEEPSEEK_V2),
    "DeepseekV3ForCausalLM": Family(name="deepseek_v3", is_latent=True, experts=DEEPSEEK_V3),
    "Gemma2ForCausalLM": Family(
        name="gemma2",
        defaults=_GEMMA
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window_pattern": 2},
        norms="both",
        norm_offset=1.0,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        windows="typed",
        scales_embeddings=True,
        has_score_scale=True,
    ),
    "Gemma3ForCausalLM": Family(
        name="gemma3_text",
        defaults=_GEMMA3,
        norms="both",
        norm_offset=1.0,
        head_norms="head",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        windows="typed",
        has_local_rope=True,
        scales_embeddings=True,
        has_score_scale=True,
    ),
    "GlmForCausalLM": _GLM4,
    "Glm4ForCausalLM": replace(
        _GLM4,
        name="glm4",
        norms="both",
        own_norm_names=(
            "input_layernorm",
            "post_self_attn_layernorm",
            "post_attention_layernorm",
            "post_mlp_layernorm",
        ),
    ),
    "Ernie4_5ForCausalLM": replace(_ERNIE, defaults={"head_dim": 128, **_ERNIE.defaults}),
    "Ernie4_5_MoeForCausalLM": replace(_ERNIE, name="ernie4_5_moe", experts=ERNIE),
    "Exaone4ForCausalLM": _EXAONE4,
    "ExaoneMoeForCausalLM": replace(_EXAONE4, name="exaone_moe", norms="before", experts=EXAONE),
    "Dots1ForCausalLM": Family(
        name="dots1",
        defaults={"max_window_layers": 62, "sliding_window": 4096, "use_sliding_window": True},
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        head_norms="head",
        windows="flagged",
        experts=DOTS_1,
    ),
    "SolarOpenForCausalLM": Family(
        name="solar_open",
        defaults={"head_dim": 128, "n_shared_experts": 1, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
        qkv_bias="attention_bias",
        experts=SOLAR_OPEN,
    ),
    "YoutuForCausalLM": Family(name="youtu", is_latent=True, defaults={"tie_word_embeddings": True}),
    "CwmForCausalLM": Family(
        name="cwm",
        defaults={"head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "sliding_window": 8192},
        windows="typed",
    ),
    "GptOssForCausalLM": Family(
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
    ),
    "GraniteForCausalLM": Family(
        name="granite",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        has_multipliers=True,
    ),
    "GraniteMoeHybridForCausalLM": Family(  # those that have neither experts nor states
        name="granitemoehybrid",
        defaults={"num_local_experts": 8, "position_embedding_type": "none"},
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        fusion="mlp",
        mlp=MlpNames("shared_mlp", "input_linear", "output_linear", "shared_intermediate_size"),
        has_multipliers=True,
    ),
    "Olmo2ForCausalLM": Family(
        name="olmo2",
        defaults={"rms_norm_eps": 1e-5},
        norms="behind",
        head_norms="whole",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
    ),
    "Olmo3ForCausalLM": Family(
        name="olmo3",
        defaults={
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        norms="behind",
        head_norms="whole",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        windows="typed",
        has_local_rope=True,
    ),
    "Phi3ForCausalLM": Family(
        name="phi3",
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        fusion="all",
        windows="every",
        has_partial_rope=True,
    ),
}
