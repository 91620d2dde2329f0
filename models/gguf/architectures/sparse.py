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
        checkpoint="Qwen2MoeForCausalLM", layer={**ATTENTION, **NORMS, **QWEN_SHARED}, reads=SHARED_SIZE
    ),
    "qwen3moe": Architecture(checkpoint="Qwen3MoeForCausalLM", layer={**QWEN3, **SPARSE}, reads=EXPERTS),
    "olmoe": Architecture(checkpoint="OlmoeForCausalLM", layer={**QWEN3, **SPARSE}, reads=EXPERTS),
    # Some have experts beside their MLPs.
    "gemma4": Architecture(
        checkpoint="Gemma4ForCausalLM",
        layer=GEMMA4,
        reads=(*WINDOW, *EXPERTS, "final_logit_softcapping", "rope.freq_base_swa"),
    ),
    "glm4moe": Architecture(
        checkpoint="Glm4MoeForCausalLM",
        layer={**ATTENTION, **HEAD_NORMS, **MLP, **NORMS_AROUND, **DEEPSEEK},
        reads=ROUTING,
    ),
    "minimax-m2": Architecture(
        checkpoint="MiniMaxM2ForCausalLM",
        layer={
            **QWEN3,
            "ffn_gate_inp": "block_sparse_moe.gate",
            "exp_probs_b": "block_sparse_moe.e_score_correction_bias",
        },
        reads=(*EXPERTS, "expert_gating_func"),
    ),
    "dots1": Architecture(checkpoint="Dots1ForCausalLM", layer={**QWEN3, **MLP, **DEEPSEEK}, reads=ROUTING),
    "ernie4_5-moe": Architecture(
        checkpoint="Ernie4_5_MoeForCausalLM",
        layer={**LLAMA, **DEEPSEEK, "exp_probs_b": "mlp.moe_statics.e_score_correction_bias"},
        reads=ROUTING,
    ),
    "exaone-moe": Architecture(
        checkpoint="ExaoneMoeForCausalLM",
        layer={**QWEN3, **MLP, **DEEPSEEK, "exp_probs_b": "mlp.e_score_correction_bias"},
        reads=(*WINDOW, *ROUTING),
    ),
    "hunyuan-moe": Architecture(
        checkpoint="HunYuanMoEV1ForCausalLM",
        layer={**DENSE["hunyuan-dense"].layer, "ffn_gate_inp": "mlp.gate.wg", **shared("mlp.shared_mlp")},
        reads=ROUTING,
    ),
    "granitemoe": Architecture(
        checkpoint="GraniteMoeForCausalLM",
        layer={**ATTENTION, **NORMS, "ffn_gate_inp": "block_sparse_moe.router.layer"},
        reads=(*MULTIPLIERS, *EXPERTS),
        permutes=True,
    ),
    "deepseek2": Architecture(
        checkpoint="DeepseekV2ForCausalLM",
        layer={**LATENT, **MLP, **NORMS, **DEEPSEEK},
        reads=(*ROUTING, "rope.scaling.yarn_log_multiplier"),
    ),
    "mistral4": Architecture(
        checkpoint="Mistral4ForCausalLM",
        layer={**LATENT, **MLP, **NORMS, **DEEPSEEK},
        reads=(*ROUTING, *GROWING, "rope.scaling.yarn_log_multiplier"),
    ),
    "llama4": Architecture(
        checkpoint="Llama4ForCausalLM",
        layer={**LLAMA4, "ffn_gate_inp": "feed_forward.router", **shared("feed_forward.shared_expert")},
        reads=(*WINDOW, *EXPERTS),
    ),
    "gpt-oss": Architecture(
        checkpoint="GptOssForCausalLM",
        layer={**ATTENTION, **NORMS_AROUND, "attn_sinks": "self_attn.sinks", "ffn_gate_inp": "mlp.router"},
        reads=(*WINDOW, *EXPERTS),
    ),
}
# A file of `llama` with experts.
MIXTRAL = Architecture(
    checkpoint="MixtralForCausalLM",
    layer={**ATTENTION, **NORMS, "ffn_gate_inp": "block_sparse_moe.gate"},
    reads=EXPERTS,
    permutes=True,
)
