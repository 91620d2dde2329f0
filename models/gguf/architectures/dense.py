"""The architectures of GGUF files whose layers attend and have an MLP."""

from __future__ import annotations

from .architecture import Architecture
from .names import (
    ATTENTION,
    FUSED_MLP,
    HEAD_NORMS,
    LLAMA,
    MLP,
    NORMS,
    NORMS_AROUND,
    NORMS_BEHIND,
    NORMS_BOTH,
    QWEN3,
)
from .reads import EXPERTS, MULTIPLIERS, WINDOW

DENSE: dict[str, Architecture] = {
    "llama": Architecture(family="LlamaForCausalLM", model_type="llama", layer=LLAMA, permutes=True, reads=EXPERTS),
    "smollm3": Architecture(family="SmolLM3ForCausalLM", model_type="smollm3", layer=LLAMA, permutes=True),
    "mistral3": Architecture(
        family="Ministral3ForCausalLM",
        model_type="ministral3",
        layer=LLAMA,
        permutes=True,
        reads=("attention.temperature_scale", "rope.scaling.yarn_log_multiplier"),
    ),
    "arcee": Architecture(
        family="ArceeForCausalLM", model_type="arcee", layer=LLAMA, permutes=True, activation="relu2"
    ),
    "qwen2": Architecture(family="Qwen2ForCausalLM", model_type="qwen2", layer=LLAMA),
    "qwen3": Architecture(family="Qwen3ForCausalLM", model_type="qwen3", layer={**QWEN3, **MLP}),
    "seed_oss": Architecture(
        family="SeedOssForCausalLM", model_type="seed_oss", layer={**ATTENTION, **MLP, **NORMS_AROUND}
    ),
    "ernie4_5": Architecture(family="Ernie4_5ForCausalLM", model_type="ernie4_5", layer=LLAMA),
    "hunyuan-dense": Architecture(
        family="HunYuanDenseV1ForCausalLM",
        model_type="hunyuan_v1_dense",
        layer={
            **LLAMA,
            "attn_q_norm": "self_attn.query_layernorm",
            "attn_k_norm": "self_attn.key_layernorm",
        },
    ),
    "gemma2": Architecture(
        family="Gemma2ForCausalLM",
        model_type="gemma2",
        layer={**ATTENTION, **MLP, **NORMS_BOTH},
        reads=(*WINDOW, "attn_logit_softcapping", "final_logit_softcapping"),
        norm_offset=1.0,
    ),
    "gemma3": Architecture(
        family="Gemma3ForCausalLM",
        model_type="gemma3_text",
        layer={**ATTENTION, **HEAD_NORMS, **MLP, **NORMS_BOTH},
        reads=(*WINDOW, "final_logit_softcapping", "rope.freq_base_swa"),
        norm_offset=1.0,
    ),
    "phi3": Architecture(
        family="Phi3ForCausalLM",
        model_type="phi3",
        layer={"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", **FUSED_MLP, **NORMS},
        reads=("attention.sliding_window", "rope.scaling.attn_factor"),
        turns_parts=True,
    ),
    "glm4": Architecture(
        family="Glm4ForCausalLM",
        model_type="glm4",
        layer={
            **ATTENTION,
            **FUSED_MLP,
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_self_attn_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        turns_parts=True,
    ),
    "exaone4": Architecture(
        family="Exaone4ForCausalLM",
        model_type="exaone4",
        layer={**ATTENTION, **HEAD_NORMS, **MLP, **NORMS_BEHIND},
        reads=WINDOW,
    ),
    "olmo2": Architecture(
        family="Olmo2ForCausalLM",
        model_type="olmo2",
        layer={**ATTENTION, **HEAD_NORMS, **MLP, **NORMS_BEHIND},
        reads=WINDOW,
    ),
    "cohere2": Architecture(
        family="Cohere2ForCausalLM",
        model_type="cohere2",
        layer={**ATTENTION, **MLP, "attn_norm": "input_layernorm"},
        reads=(*WINDOW, "logit_scale"),
    ),
    "granite": Architecture(
        family="GraniteForCausalLM", model_type="granite", layer=LLAMA, reads=MULTIPLIERS, permutes=True
    ),
}
