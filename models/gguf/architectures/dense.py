"""The architectures of GGUF files whose layers attend and have an MLP."""

from __future__ import annotations

from .architecture import Architecture
from .names import ATTENTION, FUSED_MLP, HEAD_NORMS, LLAMA, MLP, NORMS, NORMS_AROUND, NORMS_BEHIND, NORMS_BOTH, QWEN3
from .reads import EXPERTS, MULTIPLIERS, WINDOW

DENSE: dict[str, Architecture] = {
    "llama": Architecture(checkpoint="LlamaForCausalLM", layer=LLAMA, permutes=True, reads=EXPERTS),
    "smollm3": Architecture(checkpoint="SmolLM3ForCausalLM", layer=LLAMA, permutes=True),
    "mistral3": Architecture(
        checkpoint="Ministral3ForCausalLM",
        layer=LLAMA,
        permutes=True,
        reads=("attention.temperature_scale", "rope.scaling.yarn_log_multiplier"),
    ),
    "arcee": Architecture(checkpoint="ArceeForCausalLM", layer=LLAMA, permutes=True),
    "qwen2": Architecture(checkpoint="Qwen2ForCausalLM", layer=LLAMA),
    "qwen3": Architecture(checkpoint="Qwen3ForCausalLM", layer={**QWEN3, **MLP}),
    "seed_oss": Architecture(checkpoint="SeedOssForCausalLM", layer={**ATTENTION, **MLP, **NORMS_AROUND}),
    "ernie4_5": Architecture(checkpoint="Ernie4_5ForCausalLM", layer=LLAMA),
    "hunyuan-dense": Architecture(
        checkpoint="HunYuanDenseV1ForCausalLM",
        layer={**LLAMA, "attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
    ),
    "gemma2": Architecture(
        checkpoint="Gemma2ForCausalLM",
        layer={**ATTENTION, **MLP, **NORMS_BOTH},
        reads=(*WINDOW, "attn_logit_softcapping", "final_logit_softcapping"),
    ),
    "gemma3": Architecture(
        checkpoint="Gemma3ForCausalLM",
        layer={**ATTENTION, **HEAD_NORMS, **MLP, **NORMS_BOTH},
        reads=(*WINDOW, "final_logit_softcapping", "rope.freq_base_swa"),
    ),
    "phi3": Architecture(
        checkpoint="Phi3ForCausalLM",
        layer={"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", **FUSED_MLP, **NORMS},
        reads=("attention.sliding_window", "rope.scaling.attn_factor"),
    ),
    "glm4": Architecture(
        checkpoint="Glm4ForCausalLM",
        layer={
            **ATTENTION,
            **FUSED_MLP,
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_self_attn_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
    ),
    "exaone4": Architecture(
        checkpoint="Exaone4ForCausalLM", layer={**ATTENTION, **HEAD_NORMS, **MLP, **NORMS_BEHIND}, reads=WINDOW
    ),
    "olmo2": Architecture(
        checkpoint="Olmo2ForCausalLM", layer={**ATTENTION, **HEAD_NORMS, **MLP, **NORMS_BEHIND}, reads=WINDOW
    ),
    "cohere2": Architecture(
        checkpoint="Cohere2ForCausalLM",
        layer={**ATTENTION, **MLP, "attn_norm": "input_layernorm"},
        reads=(*WINDOW, "logit_scale"),
    ),
    "granite": Architecture(checkpoint="GraniteForCausalLM", layer=LLAMA, reads=MULTIPLIERS, permutes=True),
}
