"""Names of a layer's tensors: in GGUF files, and in the checkpoints of the families that have them."""

from __future__ import annotations

TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
}
FINAL_NORMS = ("output_norm.weight", "token_embd_norm.weight")  # the second one is LFM2's

ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
FUSED_MLP = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
NORMS_AROUND = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
NORMS_BEHIND = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
NORMS_BOTH = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **NORMS_BEHIND}
GEMMA4 = {
    **ATTENTION,
    **HEAD_NORMS,
    **MLP,
    **NORMS_BOTH,
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "layer_output_scale": "layer_scalar",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
}
SPARSE = {"ffn_gate_inp": "mlp.gate"}
LATENT = {
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
}

LLAMA = {**ATTENTION, **MLP, **NORMS}
LLAMA4 = {**ATTENTION, **NORMS, **{own: name.replace("mlp", "feed_forward") for own, name in MLP.items()}}
QWEN3 = {**ATTENTION, **HEAD_NORMS, **NORMS}


def shared(module: str) -> dict[str, str]:
    """Return the matrices of the expert that every token takes, which is `module` of a layer."""
    return {f"ffn_{part}_shexp": f"{module}.{part}_proj" for part in ("gate", "up", "down")}


DEEPSEEK = {**SPARSE, **shared("mlp.shared_experts"), "exp_probs_b": "mlp.gate.e_score_correction_bias"}
QWEN_SHARED = {**SPARSE, **shared("mlp.shared_expert"), "ffn_gate_inp_shexp": "mlp.shared_expert_gate"}

LFM2 = {
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    **ATTENTION,
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}


def mamba(module: str) -> dict[str, str]:
    """Return the tensors of a layer's mixer of Mamba's kind, which is `module` of the layer."""
    names = {
        "ssm_in": "in_proj",
        "ssm_conv1d": "conv1d",
        "ssm_dt": "dt",
        "ssm_a": "A_log",
        "ssm_d": "D",
        "ssm_norm": "norm",
        "ssm_out": "out_proj",
    }
    return {own: f"{module}.{name}" for own, name in names.items()}


GRANITE_HYBRID = {
    **ATTENTION,
    **NORMS,
    **mamba("mamba"),
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_down": "shared_mlp.output_linear",
    "ffn_down_shexp": "shared_mlp.output_linear",
}
GRANITE_INPUTS = {f"ffn_{part}{end}": "shared_mlp.input_linear" for end in ("", "_shexp") for part in ("gate", "up")}
NEMOTRON_H = {
    "attn_norm": "norm",
    **{own: name.replace("self_attn", "mixer") for own, name in ATTENTION.items()},
    **mamba("mixer"),
    "ffn_up": "mixer.up_proj",
    "ffn_down": "mixer.down_proj",
    "ffn_gate_inp": "mixer.gate",
    "ffn_up_shexp": "mixer.shared_experts.up_proj",
    "ffn_down_shexp": "mixer.shared_experts.down_proj",
    "ffn_latent_down": "mixer.fc1_latent_proj",
    "ffn_latent_up": "mixer.fc2_latent_proj",
    "exp_probs_b": "mixer.gate.e_score_correction_bias",
}
FALCON_H1 = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "pre_ff_layernorm",
    **ATTENTION,
    **{own: name.replace("mlp", "feed_forward") for own, name in MLP.items()},
    **mamba("mamba"),
}
DELTA_NETS = {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_ba": "linear_attn.in_proj_ba",
    **{own: name for own, name in mamba("linear_attn").items() if own not in ("ssm_in", "ssm_d")},
}
GROUPED_INPUTS = dict.fromkeys(("attn_qkv", "attn_gate"), "linear_attn.in_proj_qkvz")
