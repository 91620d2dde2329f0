"""The architectures of GGUF files that are read: a line for each that says how its files differ.

What llama.cpp's converter does to a checkpoint is undone, so that the directory that comes of a file is read like any
other: it gives the rows of queries and keys another order in some, adds the offset of a norm to its weights, stacks
experts, and leaves away what its own code knows by the architecture (https://github.com/ggml-org/llama.cpp,
`conversion/` and `src/models/`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

# What a sparse layer's experts become: a tensor for each matrix of each expert, or gpt-oss's stacks.
Experts = Literal["none", "single", "stacked"]

_ALIKE = 0.6  # of two names: difflib's own measure; below, names of strangers share as many letters

TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_NORMS_BEHIND = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NORMS_BOTH = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **_NORMS_BEHIND}
_SPARSE = {"ffn_gate_inp": "mlp.gate"}
_LATENT = {
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
}
_SHARED = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "exp_probs_b": "mlp.gate.e_score_correction_bias",
}

_WINDOW = ("attention.sliding_window", "attention.sliding_window_pattern")
_DEEPSEEK = (
    "expert_gating_func",
    "expert_group_count",
    "expert_shared_count",
    "expert_weights_norm",
    "expert_weights_scale",
    "leading_dense_block_count",
    "rope.scaling.yarn_log_multiplier",
)
_EXPERTS = ("expert_count", "expert_used_count", "expert_feed_forward_length")


@dataclass(slots=True, frozen=True, kw_only=True)
class Architecture:
    """One `general.architecture`, as far as its files differ from a Llama's."""

    family: str  # of a checkpoint: the name in config.json's `architectures`
    model_type: str
    layer: Mapping[str, str]  # a layer's tensors: names here, names in a checkpoint
    reads: tuple[str, ...] = ()  # fields beyond those that every architecture has: `config.py`
    permutes: bool = False  # rows of queries and keys: of each head's two halves in turn
    norm_offset: float = 0.0  # what stands in the file over what a checkpoint has
    experts: Experts = "none"
    expert_module: str = "mlp"
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    is_latent: bool = False  # attention is over latents: `latent.py`


_LLAMA = {**_ATTENTION, **_MLP, **_NORMS}
_QWEN3 = {**_ATTENTION, **_HEAD_NORMS, **_NORMS}

ARCHITECTURES = {
    "llama": Architecture(family="LlamaForCausalLM", model_type="llama", layer=_LLAMA, permutes=True, reads=_EXPERTS),
    "qwen2": Architecture(family="Qwen2ForCausalLM", model_type="qwen2", layer=_LLAMA),
    "qwen3": Architecture(family="Qwen3ForCausalLM", model_type="qwen3", layer={**_QWEN3, **_MLP}),
    "qwen3moe": Architecture(
        family="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        layer={**_QWEN3, **_SPARSE},
        reads=_EXPERTS,
        experts="single",
    ),
    "gemma2": Architecture(
        family="Gemma2ForCausalLM",
        model_type="gemma2",
        layer={**_ATTENTION, **_MLP, **_NORMS_BOTH},
        reads=(*_WINDOW, "attn_logit_softcapping", "final_logit_softcapping"),
        norm_offset=1.0,
    ),
    "gemma3": Architecture(
        family="Gemma3ForCausalLM",
        model_type="gemma3_text",
        layer={**_ATTENTION, **_HEAD_NORMS, **_MLP, **_NORMS_BOTH},
        reads=(*_WINDOW, "final_logit_softcapping", "rope.freq_base_swa"),
        norm_offset=1.0,
    ),
    "phi3": Architecture(
        family="Phi3ForCausalLM",
        model_type="phi3",
        layer={
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
            **_NORMS,
        },
        reads=("attention.sliding_window", "rope.dimension_count", "rope.scaling.attn_factor"),
    ),
    "olmo2": Architecture(
        family="Olmo2ForCausalLM",
        model_type="olmo2",
        layer={**_ATTENTION, **_HEAD_NORMS, **_MLP, **_NORMS_BEHIND},
        reads=_WINDOW,
    ),
    "granite": Architecture(
        family="GraniteForCausalLM",
        model_type="granite",
        layer=_LLAMA,
        reads=("attention.scale", "embedding_scale", "residual_scale", "logit_scale"),
        permutes=True,
    ),
    "deepseek2": Architecture(
        family="DeepseekV2ForCausalLM",
        model_type="deepseek_v2",
        layer={**_LATENT, **_MLP, **_NORMS, **_SPARSE, **_SHARED},
        reads=(*_EXPERTS, *_DEEPSEEK),
        experts="single",
        is_latent=True,
    ),
    "gpt-oss": Architecture(
        family="GptOssForCausalLM",
        model_type="gpt_oss",
        layer={
            **_ATTENTION,
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
        },
        reads=(*_WINDOW, *_EXPERTS),
        experts="stacked",
    ),
}
# A file of `llama` with experts.
_MIXTRAL = Architecture(
    family="MixtralForCausalLM",
    model_type="mixtral",
    layer={**_ATTENTION, **_NORMS, "ffn_gate_inp": "block_sparse_moe.gate"},
    reads=_EXPERTS,
    permutes=True,
    experts="single",
    expert_module="block_sparse_moe",
    expert_parts=("w1", "w3", "w2"),
)
# A file of `deepseek2` whose experts are scored by a sigmoid.
_DEEPSEEK_V3 = replace(ARCHITECTURES["deepseek2"], family="DeepseekV3ForCausalLM", model_type="deepseek_v3")
# A file of `olmo2` with a window.
_OLMO3 = Architecture(family="Olmo3ForCausalLM", model_type="olmo3", layer=ARCHITECTURES["olmo2"].layer, reads=_WINDOW)


def architecture(name: str, *, num_experts: int, window: int, has_sigmoid: bool) -> Architecture:
    """Return the architecture of a file. Raises ValueError, with the nearest that is read."""
    if name == "llama" and num_experts:
        return _MIXTRAL
    if name == "olmo2" and window:
        return _OLMO3
    if name == "deepseek2" and has_sigmoid:
        return _DEEPSEEK_V3
    if (found := ARCHITECTURES.get(name)) is None:
        near = nearest(name, ARCHITECTURES)
        raise ValueError(
            f"its architecture is {name}; these are read: {', '.join(ARCHITECTURES)}"
            + (f"; the nearest is {near}" if near is not None else "")
        )
    return found


def nearest(name: str, known: Mapping[str, object]) -> str | None:
    """Return the known name that is most like another; None where none is."""
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=_ALIKE)
    return found[0] if found else None
