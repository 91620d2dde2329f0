"""The families of models that run: one decoder, and a line for each family that says how it differs from it.

A family of known parts takes its entry in FAMILIES and nothing else. What one needs that no other has is a block
(`engine/nn/blocks.py`), and a field here that chooses it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .experts import DEEPSEEK_V2, DEEPSEEK_V3, GLM_4, MINIMAX_M2, MIXTRAL, ExpertTraits

Bias = bool | str  # whether there is one, or the flag of config.json that says so
# Where a layer's norms stand: before mixer and feed-forward, behind them, or both.
Norms = Literal["before", "behind", "both"]
# Of queries and keys: none, of each head, of each where `use_qk_norm` says so, or of a token's whole projection.
HeadNorms = Literal["none", "head", "flagged", "whole"]
# Which layers see a window of keys alone, if there is a window: none; each; with `use_sliding_window` each, or those
# that `layer_types` names; those that `layer_types` names, or else all but each `sliding_window_pattern`th.
Windows = Literal["none", "every", "every flagged", "flagged", "typed"]

_ALIKE = 0.6  # of two names: difflib's own measure; below, names of strangers share as many letters
# The norms before the mixer, behind it, before the feed-forward and behind it, as a checkpoint names them.
_NORM_NAMES: dict[Norms, tuple[str | None, str | None, str | None, str | None]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "behind": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


@dataclass(slots=True, frozen=True, kw_only=True)
class Family:
    """A family says how it differs from a Llama without biases."""

    name: str  # the `model_type` of its config.json
    defaults: Mapping[str, object] = field(default_factory=dict, hash=False)  # what config.json need not tell
    text_type: str | None = None  # of the `text_config` that is the language model, beside parts that see
    norms: Norms = "before"
    norm_offset: float = 0.0  # what a norm's weights stand below the factors that they mean
    head_norms: HeadNorms = "none"
    qkv_bias: Bias = False
    o_bias: Bias = False
    mlp_bias: Bias = False
    is_fused: bool = False  # a checkpoint has q, k and v in one tensor, and gate and up in another
    has_sinks: bool = False  # a weight of each head that no token's value goes with
    is_latent: bool = False  # attention is over latents: `latent.py`
    windows: Windows = "none"
    experts: ExpertTraits | None = None  # in some or all layers
    has_local_rope: bool = False  # layers with a window turn positions by another base
    has_partial_rope: bool = False  # config.json may leave a part of each head unturned
    has_unturned_layers: bool = False  # some layers turn nothing by positions
    scales_embeddings: bool = False  # by the root of their size
    has_multipliers: bool = False  # of embeddings, residual stream, scores and logits, in Granite's words
    has_score_scale: bool = False  # by `query_pre_attn_scalar` in place of the head's size; and caps

    @property
    def norm_names(self) -> tuple[str | None, str | None, str | None, str | None]:
        """Return the names of a layer's norms: before the mixer, behind it, before the feed-forward, behind it."""
        return _NORM_NAMES[self.norms]


_GEMMA: dict[str, object] = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA3: dict[str, object] = _GEMMA | {
    "max_position_embeddings": 131_072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rope_local_base_freq": 10_000.0,
    "rope_theta": 1_000_000.0,
    "sliding_window_pattern": 6,
    "vocab_size": 262_208,
}


def _gemma3(name: str, text_type: str | None = None) -> Family:
    return Family(
        name=name,
        defaults=_GEMMA3,
        text_type=text_type,
        norms="both",
        norm_offset=1.0,
        head_norms="head",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        windows="typed",
        has_local_rope=True,
        scales_embeddings=True,
        has_score_scale=True,
    )


FAMILIES = {
    "LlamaForCausalLM": Family(name="llama", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "SmolLM3ForCausalLM": Family(
        name="smollm3",
        defaults={"no_rope_layer_interval": 4, "rope_theta": 2_000_000.0, "tie_word_embeddings": True},
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        windows="flagged",
        has_unturned_layers=True,
    ),
    "SeedOssForCausalLM": Family(
        name="seed_oss",
        defaults={"attention_bias": True, "head_dim": 128},
        qkv_bias="attention_bias",
        o_bias="attention_out_bias",
        mlp_bias="mlp_bias",
    ),
    "MistralForCausalLM": Family(name="mistral", defaults={"sliding_window": 4096}, windows="every"),
    "Mistral3ForConditionalGeneration": Family(
        name="mistral3", text_type="mistral", defaults={"sliding_window": 4096}, windows="every"
    ),
    "Qwen2ForCausalLM": Family(name="qwen2", defaults={"sliding_window": 4096}, qkv_bias=True, windows="flagged"),
    "Qwen3ForCausalLM": Family(
        name="qwen3",
        defaults={"head_dim": 128, "sliding_window": 4096},
        head_norms="head",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        windows="flagged",
    ),
    "MixtralForCausalLM": Family(name="mixtral", windows="every", experts=MIXTRAL),
    "MiniMaxM2ForCausalLM": Family(
        name="minimax_m2",
        defaults={"head_dim": 128, "rope_theta": 5_000_000.0},
        head_norms="whole",
        has_partial_rope=True,
        experts=MINIMAX_M2,
    ),
    "Qwen3MoeForCausalLM": Family(
        name="qwen3_moe",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        defaults={"sliding_window": 4096},
        head_norms="head",
        windows="every flagged",
        experts=ExpertTraits(),
    ),
    "OlmoeForCausalLM": Family(
        name="olmoe",
        defaults={"rms_norm_eps": 1e-5},
        head_norms="whole",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        experts=ExpertTraits(),
    ),
    "Glm4MoeForCausalLM": Family(
        name="glm4_moe",
        defaults={"n_shared_experts": 1, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5},
        head_norms="flagged",
        qkv_bias="attention_bias",
        has_partial_rope=True,
        experts=GLM_4,
    ),
    "Glm4MoeLiteForCausalLM": Family(
        name="glm4_moe_lite",
        defaults={
            "n_shared_experts": 1,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 192,
            "rms_norm_eps": 1e-5,
            "routed_scaling_factor": 1.8,
            "v_head_dim": 256,
        },
        is_latent=True,
        experts=GLM_4,
    ),
    "DeepseekV2ForCausalLM": Family(name="deepseek_v2", is_latent=True, mlp_bias="mlp_bias", experts=DEEPSEEK_V2),
    "DeepseekV3ForCausalLM": Family(name="deepseek_v3", is_latent=True, experts=DEEPSEEK_V3),
    "Gemma2ForCausalLM": Family(
        name="gemma2",
        defaults=_GEMMA
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window_pattern": 2},
        norms="both",
        norm_offset=1.0,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        windows="typed",
        scales_embeddings=True,
        has_score_scale=True,
    ),
    "Gemma3ForCausalLM": _gemma3("gemma3_text"),
    "Gemma3ForConditionalGeneration": _gemma3("gemma3", "gemma3_text"),
    "GptOssForCausalLM": Family(
        name="gpt_oss",
        defaults={
            "attention_bias": True,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000.0,
            "sliding_window": 128,
            "sliding_window_pattern": 2,
        },
        experts=ExpertTraits(gate="router", normalised=True, is_stacked=True),
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        has_sinks=True,
        windows="typed",
    ),
    "GraniteForCausalLM": Family(
        name="granite",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        has_multipliers=True,
    ),
    "Olmo2ForCausalLM": Family(
        name="olmo2",
        defaults={"rms_norm_eps": 1e-5},
        norms="behind",
        head_norms="whole",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
    ),
    "Olmo3ForCausalLM": Family(
        name="olmo3",
        defaults={
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        norms="behind",
        head_norms="whole",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        windows="typed",
        has_local_rope=True,
    ),
    "Phi3ForCausalLM": Family(
        name="phi3",
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        is_fused=True,
        windows="every",
        has_partial_rope=True,
    ),
}


def architecture_of(model_type: object) -> str | None:
    """Return the architecture of a family by its name."""
    return next((name for name, family in FAMILIES.items() if family.name == model_type), None)


def nearest(name: str) -> str | None:
    """Return the known architecture whose name is most like another's; None where none is."""
    stems = {_stem(known): known for known in reversed(FAMILIES)}
    found = difflib.get_close_matches(_stem(name), stems, n=1, cutoff=_ALIKE)
    return stems[found[0]] if found else None


def _stem(architecture: str) -> str:
    return architecture.partition("For")[0].lower()


def needs_code(config: Mapping[str, object]) -> bool:
    """Tell whether a config.json asks for Python code in place of which there is none here.

    Checkpoints of known families often carry the code of the time before libraries knew them (Phi-3, DeepSeek-V2): the
    class that it names is the architecture's, which is built in. transformers takes its own class there, too.
    """
    if "auto_map" not in config:
        return False
    code, declared = config["auto_map"], config.get("architectures")
    architecture = declared[0] if isinstance(declared, list) and declared else None
    named = code.get("AutoModelForCausalLM") if isinstance(code, Mapping) else None
    is_known = isinstance(named, str) and named.rpartition(".")[2] == architecture and architecture in FAMILIES
    return not is_known
