"""The architectures of GGUF files whose layers attend and have experts."""

from __future__ import annotations

from .architecture import Architecture
from .dense import DENSE
from .names import (
    ATTENTION,
    DEEPSEEK,
    GEMMA4,
    HEAD_NORMS,
    LATENT,
    LLAMA,
    LLAMA4,
    MLP,
    NORMS,
    NORMS_AROUND,
    QWEN3,
    QWEN_SHARED,
    SPARSE,
    shared,
)
from .reads import EXPERTS, GROWING, MULTIPLIERS, ROUTING, SHARED_SIZE, WINDOW

WITH_EXPERTS: dict[str, Architecture] = {
    "qwen2moe": Architecture(
        family="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        layer={**ATTENTION, **NORMS, **QWEN_SHARED},
        reads=SHARED_SIZE,
        experts="single",
    ),
    "qwen3moe": Architecture(
        family="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        layer={**QWEN3, **SPARSE},
        reads=EXPERTS,
        experts="single",
    ),
    "olmoe": Architecture(
        family="OlmoeForCausalLM",
        model_type="olmoe",
        layer={**QWEN3, **SPARSE},
        reads=EXPERTS,
        experts="single",
    ),
    # Some have experts beside their MLPs.
    "gemma4": Architecture(
        family="Gemma4ForCausalLM",
        model_type="gemma4_text",
        layer=GEMMA4,
        reads=(*WINDOW, *EXPERTS, "final_logit_softcapping", "rope.freq_base_swa"),
        turns_fastest=True,
        experts="single",
        expert_module="",
    ),
    "glm4moe": Architecture(
        family="Glm4MoeForCausalLM",
        model_type="glm4_moe",
        layer={**ATTENTION, **HEAD_NORMS, **MLP, **NORMS_AROUND, **DEEPSEEK},
        reads=ROUTING,
        turns_parts=True,
        experts="single",
    ),
    "minimax-m2": Architecture(
        family="MiniMaxM2ForCausalLM",
        model_type="minimax_m2",
        layer={
            **QWEN3,
            "ffn_gate_inp": "block_sparse_moe.gate",
            "exp_probs_b": "block_sparse_moe.e_score_correction_bias",
        },
        reads=(*EXPERTS, "expert_gating_func"),
        turns_parts=True,
        experts="single",
        expert_module="block_sparse_moe",
        expert_parts=("w1", "w3", "w2"),
    ),
    "dots1": Architecture(
        family="Dots1ForCausalLM",
        model_type="dots1",
        layer={**QWEN3, **MLP, **DEEPSEEK},
        reads=ROUTING,
        experts="single",
    ),
    "ernie4_5-moe": Architecture(
        family="Ernie4_5_MoeForCausalLM",
        model_type="ernie4_5_moe",
        layer={**LLAMA, **DEEPSEEK, "exp_probs_b": "mlp.moe_statics.e_score_correction_bias"},
        reads=ROUTING,
        experts="single",
    ),
    "exaone-moe": Architecture(
        family="ExaoneMoeForCausalLM",
        model_type="exaone_moe",
        layer={**QWEN3, **MLP, **DEEPSEEK, "exp_probs_b": "mlp.e_score_correction_bias"},
        reads=(*WINDOW, *ROUTING),
        experts="single",
    ),
    "hunyuan-moe": Architecture(
        family="HunYuanMoEV1ForCausalLM",
        model_type="hunyuan_v1_moe",
        layer={
            **DENSE["hunyuan-dense"].layer,
            "ffn_gate_inp": "mlp.gate.wg",
            **shared("mlp.shared_mlp"),
        },
        reads=ROUTING,
        experts="single",
    ),
    "granitemoe": Architecture(
        family="GraniteMoeForCausalLM",
        model_type="granitemoe",
        layer={**ATTENTION, **NORMS, "ffn_gate_inp": "block_sparse_moe.router.layer"},
        reads=(*MULTIPLIERS, *EXPERTS),
        permutes=True,
        experts="single",
        expert_module="block_sparse_moe",
    ),
    "deepseek2": Architecture(
        family="DeepseekV2ForCausalLM",
        model_type="deepseek_v2",
        layer={**LATENT, **MLP, **NORMS, **DEEPSEEK},
        reads=(*ROUTING, "rope.scaling.yarn_log_multiplier"),
        experts="single",
        is_latent=True,
    ),
    "mistral4": Architecture(
        family="Mistral4ForCausalLM",
        model_type="mistral4",
        layer={**LATENT, **MLP, **NORMS, **DEEPSEEK},
        reads=(*ROUTING, *GROWING, "rope.scaling.yarn_log_multiplier"),
        experts="single",
        is_latent=True,
    ),
    "llama4": Architecture(
        family="Llama4ForCausalLM",
        model_type="llama4_text",
        layer={**LLAMA4, "ffn_gate_inp": "feed_forward.router", **shared("feed_forward.shared_expert")},
        reads=(*WINDOW, *EXPERTS),
        experts="single",
        expert_module="feed_forward",
    ),
    "gpt-oss": Architecture(
        family="GptOssForCausalLM",
        model_type="gpt_oss",
        layer={
            **ATTENTION,
            **NORMS_AROUND,
            "attn_sinks": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
        },
        reads=(*WINDOW, *EXPERTS),
        experts="stacked",
    ),
}
# A file of `llama` with experts.
MIXTRAL = Architecture(
    family="MixtralForCausalLM",
    model_type="mixtral",
    layer={**ATTENTION, **NORMS, "ffn_gate_inp": "block_sparse_moe.gate"},
    reads=EXPERTS,
    permutes=True,
    experts="single",
    expert_module="block_sparse_moe",
    expert_parts=("w1", "w3", "w2"),
)
