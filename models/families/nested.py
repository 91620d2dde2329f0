"""Architectures of several parts, of which one is a language model of a known family: that part alone is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True, frozen=True, kw_only=True)
class Nested:
    """A model has a language model beside parts that see."""

    name: str  # the `model_type` of its config.json
    # The language model's architecture, by the `model_type` of `text_config`; the first where none is told.
    texts: Mapping[str, str]
    # What config.json need not tell of it, where the class of this language model has another number than its family's.
    defaults: Mapping[str, object] = field(default_factory=dict)


NESTED = {
    "Mistral3ForConditionalGeneration": Nested(
        name="mistral3",
        texts={
            "mistral": "MistralForCausalLM",
            "ministral3": "Ministral3ForCausalLM",
            "mistral4": "Mistral4ForCausalLM",
        },
    ),
    "Llama4ForConditionalGeneration": Nested(name="llama4", texts={"llama4_text": "Llama4ForCausalLM"}),
    "Gemma3ForConditionalGeneration": Nested(name="gemma3", texts={"gemma3_text": "Gemma3ForCausalLM"}),
    "Gemma4ForConditionalGeneration": Nested(name="gemma4", texts={"gemma4_text": "Gemma4ForCausalLM"}),
    "Qwen2_5_VLForConditionalGeneration": Nested(
        name="qwen2_5_vl",
        texts={"qwen2_5_vl_text": "Qwen2ForCausalLM"},
        defaults={"max_window_layers": 80, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
    ),
    "Qwen3_5ForConditionalGeneration": Nested(name="qwen3_5", texts={"qwen3_5_text": "Qwen3_5ForCausalLM"}),
    "Qwen3_5MoeForConditionalGeneration": Nested(
        name="qwen3_5_moe", texts={"qwen3_5_moe_text": "Qwen3_5MoeForCausalLM"}
    ),
    "Qwen3VLMoeForConditionalGeneration": Nested(
        name="qwen3_vl_moe", texts={"qwen3_vl_moe_text": "Qwen3VLMoeTextForCausalLM"}
    ),
    "Qwen3VLForConditionalGeneration": Nested(
        name="qwen3_vl", texts={"qwen3_vl_text": "Qwen3ForCausalLM"}, defaults={"rope_theta": 500_000.0}
    ),
}
