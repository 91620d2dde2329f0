"""config.json and its like of a GGUF file, from its own fields, as Hugging Face's files have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .architectures import Architecture, architecture
from .fields import GgufFields
from .latent import has_sigmoid, latent_fields
from .rope import rope_fields

Json = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]  # of all tensors of the file, by their names there

SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # tokens: a checkpoint's names, a file's

# Fields under which a model computes otherwise, and the values under which it does not. An architecture's own fields
# (`Architecture.reads`) are excepted.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_gating_func": (0, 1),  # softmax
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scale_linear": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "router_logit_softcapping": (0.0,),
}
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|return|>", "<|call|>")
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}  # layers of the models whose scores go by the hidden size
_PERIODS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "olmo2": 4}  # of layers, the last of which sees everything


def gguf_architecture(fields: GgufFields) -> Architecture:
    """Raises ValueError for an architecture that is not read, or a field under which it would be computed wrongly."""
    found = architecture(
        fields.architecture,
        num_experts=fields.integer(fields.of_model("expert_count"), 0),
        window=fields.integer(fields.of_model("attention.sliding_window"), 0),
        has_sigmoid=has_sigmoid(fields),
    )
    for name in sorted(_NEUTRAL.keys() - set(found.reads)):
        value = fields.find(fields.of_model(name))
        if value is not None and value not in _NEUTRAL[name]:
            raise ValueError(f"{fields.of_model(name)} = {value!r} is not supported")
    return found


def gguf_model_config(fields: GgufFields, of: Architecture, shapes: Shapes, factors: Mapping[str, list[float]]) -> Json:
    """Return config.json. `factors`: by what rotary frequencies are divided, by their tensor's name. Raises ValueError.

    The vocabulary is as large as the embedding: a file may have padding in it, or none where the checkpoint has some.
    """
    hidden_size, num_heads = _count(fields, "embedding_length"), _count(fields, "attention.head_count")
    num_layers = _count(fields, "block_count")
    found_layers = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    if num_layers != len(found_layers):
        raise ValueError(f"{fields.of_model('block_count')} = {num_layers}, and it has {len(found_layers)} layers")
    head_dim = _head_dim(fields, of, hidden_size // num_heads)
    special = {
        f"{name}_token_id": fields.integer(f"tokenizer.ggml.{key}_token_id")
        for name, key in SPECIAL.items()
        if name != "unk" and fields.find(f"tokenizer.ggml.{key}_token_id") is not None
    }
    config: Json = {
        "architectures": [of.family],
        "model_type": of.model_type,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer(fields.of_model("feed_forward_length"), 0),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.integer(fields.of_model("attention.head_count_kv"), num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": _count(fields, "context_length"),
        "rms_norm_eps": fields.number(fields.of_model("attention.layer_norm_rms_epsilon")),
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "tie_word_embeddings": "output.weight" not in shapes,
        "vocab_size": shapes["token_embd.weight"][0],
        **rope_fields(fields, head_dim, factors),
        **special,
        "torch_dtype": "bfloat16",
    }
    if of.experts != "none":
        config |= _expert_fields(fields)
    own = _OWN.get(fields.architecture)
    return config if own is None else config | own(fields, config)


def _head_dim(fields: GgufFields, of: Architecture, default: int) -> int:
    """Return the numbers of a head; of latents, those that positions turn."""
    if of.is_latent:
        return _count(fields, "rope.dimension_count")
    head_dim = fields.integer(fields.of_model("attention.key_length"), default)
    if (value_dim := fields.integer(fields.of_model("attention.value_length"), head_dim)) != head_dim:
        raise ValueError(f"values of {value_dim} numbers beside keys of {head_dim} are not supported")
    return head_dim


def _count(fields: GgufFields, name: str) -> int:
    if (value := fields.integer(fields.of_model(name))) < 1:
        raise ValueError(f"{fields.of_model(name)} = {value} is less than 1")
    return value


def _expert_fields(fields: GgufFields) -> Json:
    """Return what config.json says of experts, under each of the families' names for it.

    That a token's weights add up to 1 is in llama.cpp's code, not in the file (`src/models/qwen3moe.cpp`).
    """
    num_experts = _count(fields, "expert_count")
    found: Json = {
        "num_experts": num_experts,
        "num_local_experts": num_experts,
        "num_experts_per_tok": _count(fields, "expert_used_count"),
        "norm_topk_prob": True,
    }
    if (size := fields.find(fields.of_model("expert_feed_forward_length"))) is not None:
        found["moe_intermediate_size"] = size
    return found


def _windows(fields: GgufFields, num_layers: int) -> Json:
    """Return the window, and which layers have it: each of a list, or all but the last of each period."""
    window = fields.integer(fields.of_model("attention.sliding_window"), 0)
    pattern = fields.find(fields.of_model("attention.sliding_window_pattern"))
    if pattern is None:
        pattern = _PERIODS[fields.architecture]
    if isinstance(pattern, int):
        pattern = [pattern == 0 or (layer + 1) % pattern != 0 for layer in range(num_layers)]
    if not isinstance(pattern, list) or len(pattern) != num_layers:
        raise ValueError(f"attention.sliding_window_pattern = {pattern!r} does not fit {num_layers} layers")
    kinds = ["sliding_attention" if is_sliding else "full_attention" for is_sliding in pattern]
    return {"sliding_window": window or None, "layer_types": kinds}


def _gemma(fields: GgufFields, config: Json) -> Json:
    """Return a Gemma's own fields. The scale of scores is known by the number of layers alone, as in llama.cpp."""
    caps = {
        name: fields.number(fields.of_model(name))
        for name in ("attn_logit_softcapping", "final_logit_softcapping")
        if fields.find(fields.of_model(name)) not in (None, 0.0)
    }
    is_27b = config["num_hidden_layers"] == _GEMMA_27B[fields.architecture]
    found: Json = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
        ),
        **caps,  # what a file does not tell is its family's
        **_windows(fields, config["num_hidden_layers"]),
    }
    if fields.architecture == "gemma2":
        return found | ({} if found["sliding_window"] else {"sliding_window": 4096})  # older files tell none
    full = {"rope_type": "default", "rope_theta": config["rope_theta"], **(config["rope_scaling"] or {})}
    local = fields.number(fields.of_model("rope.freq_base_swa"), 10_000.0)
    return found | {
        "rope_scaling": None,
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _granite(fields: GgufFields, config: Json) -> Json:
    if not fields.flag(fields.of_model("rope.scaling.finetuned"), default=True):
        raise ValueError("a Granite without rotary positions is not supported")
    scale = fields.find(fields.of_model("attention.scale"))
    return {
        "attention_multiplier": (
            fields.number(fields.of_model("attention.scale")) if scale else 1 / math.sqrt(config["head_dim"])
        ),
        "embedding_multiplier": fields.number(fields.of_model("embedding_scale"), 1.0),
        "residual_multiplier": fields.number(fields.of_model("residual_scale"), 1.0),
        "logits_scaling": fields.number(fields.of_model("logit_scale")),
    }


def _gpt_oss(fields: GgufFields, config: Json) -> Json:
    """Return gpt-oss's own fields. Its yarn is not rounded to whole frequencies, which no field tells."""
    found = _windows(fields, config["num_hidden_layers"])
    found["intermediate_size"] = _count(fields, "expert_feed_forward_length")
    if config["rope_scaling"] is not None:
        found["rope_scaling"] = config["rope_scaling"] | {"truncate": False}
    return found


def _olmo(fields: GgufFields, config: Json) -> Json:
    """Return OLMo 3's own fields: layers with a window have no scaling. OLMo 2, the same without windows, has none."""
    windows = _windows(fields, config["num_hidden_layers"])
    if windows["sliding_window"] is None:
        return {}
    plain = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    return windows | {
        "rope_scaling": None,
        "rope_parameters": {
            "full_attention": plain | (config["rope_scaling"] or {}),
            "sliding_attention": plain,
        },
    }


def _phi3(fields: GgufFields, config: Json) -> Json:
    head_dim = config["head_dim"]
    turned = fields.integer(fields.of_model("rope.dimension_count"), head_dim)
    return {
        "sliding_window": fields.integer(fields.of_model("attention.sliding_window"), 0) or None,
        "partial_rotary_factor": turned / head_dim,
    }


_OWN: dict[str, Callable[[GgufFields, Json], Json]] = {
    "deepseek2": latent_fields,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "gpt-oss": _gpt_oss,
    "granite": _granite,
    "olmo2": _olmo,
    "phi3": _phi3,
}


def gguf_generation_config(fields: GgufFields, config: Mapping[str, object]) -> Json:
    """Return generation_config.json: an answer ends where the model ends it, or its turn.

    Few files name the token that ends a turn; as in llama.cpp, it is known by its text.
    """
    special = {f"{name}_token_id": config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    turns = [fields.find(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    tokens = {token: index for index, token in enumerate(fields.texts("tokenizer.ggml.tokens")) if token in _TURN_ENDS}
    if "<|return|>" in tokens:  # of gpt-oss, where `<|end|>` is between two parts of a turn
        tokens.pop("<|end|>", None)
    turns += tokens.values()
    ends = list(dict.fromkeys(end for end in (special["eos_token_id"], *turns) if isinstance(end, int)))
    if len(ends) > 1:
        special["eos_token_id"] = ends
    return {key: value for key, value in special.items() if value is not None}


def gguf_tokenizer_config(fields: GgufFields, max_model_len: object) -> Json:
    tokens = fields.texts("tokenizer.ggml.tokens")
    config: Json = {
        f"{name}_token": tokens[fields.integer(f"tokenizer.ggml.{key}_token_id")]
        for name, key in SPECIAL.items()
        if fields.find(f"tokenizer.ggml.{key}_token_id") is not None
    }
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_model_len,
        "clean_up_tokenization_spaces": False,
    }
    template, tool_use = (fields.find(f"tokenizer.chat_template{name}") for name in ("", ".tool_use"))
    if template is None:
        return config
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": tool_use}]
    return config | {"chat_template": template if tool_use is None else named}
