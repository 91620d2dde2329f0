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
    "lfm2": Architecture(checkpoint="Lfm2ForCausalLM", layer=LFM2),
    "lfm2moe": Architecture(
        checkpoint="Lfm2MoeForCausalLM",
        layer={**LFM2, "ffn_gate_inp": "feed_forward.gate", "exp_probs_b": "feed_forward.expert_bias"},
        reads=ROUTING,
    ),
    "granitehybrid": Architecture(
        checkpoint="GraniteMoeHybridForCausalLM",
        layer=GRANITE_HYBRID,
        reads=(*MULTIPLIERS, *SHARED_SIZE),
        permutes=True,
        fused=GRANITE_INPUTS,
    ),
    "nemotron_h": Architecture(checkpoint="NemotronHForCausalLM", layer=NEMOTRON_H, reads=ROUTING),
    "falcon-h1": Architecture(checkpoint="FalconH1ForCausalLM", layer=FALCON_H1),
    "qwen3next": Architecture(
        checkpoint="Qwen3NextForCausalLM", layer={**_QWEN_NEXT, **QWEN_SHARED}, reads=SHARED_SIZE, fused=GROUPED_INPUTS
    ),
    "qwen35": Architecture(checkpoint="Qwen3_5ForCausalLM", layer={**_QWEN_NEXT, **MLP}),
    "qwen35moe": Architecture(
        checkpoint="Qwen3_5MoeForCausalLM", layer={**_QWEN_NEXT, **QWEN_SHARED}, reads=SHARED_SIZE
    ),
}
