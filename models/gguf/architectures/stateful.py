"""The architectures of GGUF files some of whose layers keep a state."""

from __future__ import annotations

from .architecture import Architecture
from .names import (
    ATTENTION,
    DELTA_NETS,
    FALCON_H1,
    GRANITE_HYBRID,
    GRANITE_INPUTS,
    GROUPED_INPUTS,
    HEAD_NORMS,
    LFM2,
    MLP,
    NEMOTRON_H,
    NORMS_AROUND,
    QWEN_SHARED,
)
from .reads import MULTIPLIERS, ROUTING, SHARED_SIZE

_QWEN_NEXT = {**ATTENTION, **HEAD_NORMS, **NORMS_AROUND, **DELTA_NETS}
WITH_STATES: dict[str, Architecture] = {
    "lfm2": Architecture(
        family="Lfm2ForCausalLM", model_type="lfm2", layer=LFM2, final_norm="embedding_norm", states="convolutions"
    ),
    "lfm2moe": Architecture(
        family="Lfm2MoeForCausalLM",
        model_type="lfm2_moe",
        layer={**LFM2, "ffn_gate_inp": "feed_forward.gate", "exp_probs_b": "feed_forward.expert_bias"},
        final_norm="embedding_norm",
        reads=ROUTING,
        states="convolutions",
        experts="single",
        expert_module="feed_forward",
        expert_parts=("w1", "w3", "w2"),
    ),
    "granitehybrid": Architecture(
        family="GraniteMoeHybridForCausalLM",
        model_type="granitemoehybrid",
        layer=GRANITE_HYBRID,
        reads=(*MULTIPLIERS, *SHARED_SIZE),
        permutes=True,
        states="mamba",
        fused=GRANITE_INPUTS,
        experts="single",
        expert_module="block_sparse_moe",
    ),
    "nemotron_h": Architecture(
        family="NemotronHForCausalLM",
        model_type="nemotron_h",
        layer=NEMOTRON_H,
        final_norm="norm_f",
        activation="relu2",
        reads=ROUTING,
        turns_parts=True,  # of any length: none is turned
        states="mamba",
        experts="single",
        expert_module="mixer",
        expert_parts=("up_proj", "down_proj"),
    ),
    "falcon-h1": Architecture(
        family="FalconH1ForCausalLM",
        model_type="falcon_h1",
        layer=FALCON_H1,
        final_norm="final_layernorm",
        states="mamba",
    ),
    "qwen3next": Architecture(
        family="Qwen3NextForCausalLM",
        model_type="qwen3_next",
        layer={**_QWEN_NEXT, **QWEN_SHARED},
        reads=SHARED_SIZE,
        turns_parts=True,
        norm_offset=1.0,
        states="grouped delta nets",
        fused=GROUPED_INPUTS,
        experts="single",
    ),
    "qwen35": Architecture(
        family="Qwen3_5ForCausalLM",
        model_type="qwen3_5_text",
        layer={**_QWEN_NEXT, **MLP},
        turns_parts=True,
        norm_offset=1.0,
        states="delta nets",
    ),
    "qwen35moe": Architecture(
        family="Qwen3_5MoeForCausalLM",
        model_type="qwen3_5_moe_text",
        layer={**_QWEN_NEXT, **QWEN_SHARED},
        reads=SHARED_SIZE,
        turns_parts=True,
        norm_offset=1.0,
        states="delta nets",
        experts="single",
    ),
}
