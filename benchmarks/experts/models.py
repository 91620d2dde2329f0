"""Mixtures of experts to measure, as config.json has them: small ones of some 1 GB with the parts of large ones."""

from __future__ import annotations

_COMMON: dict[str, object] = {
    "hidden_act": "silu",
    "num_hidden_layers": 12,
    "norm_topk_prob": True,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "eos_token_id": 1,
}
MODELS: dict[str, dict[str, object]] = {
    "qwen3-moe": _COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 768,
        "intermediate_size": 2048,
        "moe_intermediate_size": 768,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
    },
    # Attention is DeepSeek-V2-Lite's: 16 heads over latents of 512 + 64 numbers.
    "deepseek-v2": _COMMON
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "moe_intermediate_size": 256,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 32,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "first_k_dense_replace": 1,
    },
}
