"""config.json and its like of a GGUF file, from its own fields, as Hugging Face's files have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .architectures.architecture import Architecture
from .architectures.lookup import architecture
from .fields import GgufFields
from .latent import has_sigmoid
from .model_file import Json, ModelFile, Shapes
from .own_fields import OWN_FIELDS
from .rope import rope_fields

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
    "residual_scale": (0.0, 1.0),
    "rope.scale_linear": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "router_logit_softcapping": (0.0,),
}
_POOLINGS = {1: "mean", 2: "cls", 3: "lasttoken"}  # llama.cpp's numbers; 0 is none, 4 the score of a reranker
_TURN_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|return|>", "<|call|>"),
    *("<turn|>", "<|tool_response>"),  # Gemma 4's: the second one behind calls, where results would begin
)


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
    file = ModelFile(fields, {}, shapes, factors)
    hidden_size, num_heads = fields.count("embedding_length"), fields.count("attention.head_count")
    num_layers = _num_own_layers(fields)
    found_layers = {int(name.split(".")[1]) for name in shapes if name.startswith("blk.")}
    if len(found_layers) not in (num_layers, fields.count("block_count")):
        raise ValueError(
            f"{fields.of_model('block_count')} = {fields.count('block_count')}, and it has {len(found_layers)} layers"
        )
    if "token_embd.weight" not in shapes:
        raise ValueError("it has no tensor token_embd.weight")
    head_dim = _head_dim(fields, of, hidden_size // num_heads)
    special = {
        f"{name}_token_id": fields.special[key]
        for name, key in SPECIAL.items()
        if name != "unk" and key in fields.special
    }
    config: Json = {
        "architectures": [of.checkpoint],
        "model_type": of.family.name,
        "hidden_act": of.family.defaults.get("hidden_act", "silu"),
        "hidden_size": hidden_size,
        "intermediate_size": max(fields.of_layers("feed_forward_length", num_layers, 0)),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": max(fields.of_layers("attention.head_count_kv", num_layers, num_heads)),
        "head_dim": head_dim,
        "max_position_embeddings": fields.count("context_length"),
        "rms_norm_eps": _epsilon(fields),
        "attention_bias": file.has("attn_q.bias"),
        "mlp_bias": file.has("ffn_up.bias"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "vocab_size": shapes["token_embd.weight"][0],
        **rope_fields(fields, head_dim, {} if of.family.has_wide_layers else factors, may_turn_parts=of.may_turn_parts),
        **special,
        "torch_dtype": "bfloat16",
    }
    if of.family.experts is not None and fields.find(fields.of_model("expert_count")):
        config |= _expert_fields(fields)
    own = OWN_FIELDS.get(fields.architecture)
    return config if own is None else config | own(replace(file, config=config))


def _num_own_layers(fields: GgufFields) -> int:
    """Count the model's layers: others behind them, which predict further tokens, are not read."""
    return fields.count("block_count") - fields.integer(fields.of_model("nextn_predict_layers"), 0)


def _epsilon(fields: GgufFields) -> float:
    """Return what norms add to a mean of squares, of either kind of norms."""
    names = [fields.of_model(f"attention.layer_norm{kind}_epsilon") for kind in ("_rms", "")]
    return fields.number(names[0] if fields.find(names[0]) is not None else names[1])


def _head_dim(fields: GgufFields, of: Architecture, default: int) -> int:
    """Return the numbers of a head; of latents, those that positions turn."""
    if of.family.is_latent:
        return fields.count("rope.dimension_count")
    narrow = fields.find(fields.of_model("attention.key_length_swa"))
    if of.family.has_wide_layers and narrow is not None:
        return fields.count("attention.key_length_swa")
    head_dim = fields.integer(fields.of_model("attention.key_length"), default)
    if (value_dim := fields.integer(fields.of_model("attention.value_length"), head_dim)) != head_dim:
        raise ValueError(f"values of {value_dim} numbers beside keys of {head_dim} are not supported")
    return head_dim


def _expert_fields(fields: GgufFields) -> Json:
    """Return what config.json says of experts, under each of the families' names for it.

    That a token's weights add up to 1 is in llama.cpp's code, not in the file (`src/models/qwen3moe.cpp`).
    """
    num_experts = fields.count("expert_count")
    found: Json = {
        "num_experts": num_experts,
        "num_local_experts": num_experts,
        "num_experts_per_tok": fields.count("expert_used_count"),
        "norm_topk_prob": True,
    }
    if (size := fields.find(fields.of_model("expert_feed_forward_length"))) is not None:
        found["moe_intermediate_size"] = size
    return found


def gguf_generation_config(fields: GgufFields, config: Mapping[str, object]) -> Json:
    """Return generation_config.json: an answer ends where the model ends it, or its turn.

    Few files name the token that ends a turn; as in llama.cpp, it is known by its text.
    """
    special = {f"{name}_token_id": config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    turns = [fields.special.get(name) for name in ("eot", "eom")]
    tokens = fields.texts("tokenizer.ggml.tokens")
    texts = {*_TURN_ENDS}
    if "<|return|>" in tokens:  # of gpt-oss, where `<|end|>` is between two parts of a turn
        texts.remove("<|end|>")
    turns += (index for index, token in enumerate(tokens) if token in texts)  # of one text there may be several
    ends = list(dict.fromkeys(end for end in (special["eos_token_id"], *turns) if isinstance(end, int)))
    if len(ends) > 1:
        special["eos_token_id"] = ends
    return {key: value for key, value in special.items() if value is not None}


def gguf_pooling(fields: GgufFields) -> str | None:
    """Return which tokens make the vector of an embedding model; None: it is a model that generates.

    Raises ValueError for what no worker does.
    """
    key = fields.of_model("pooling_type")
    number = fields.integer(key, 0)
    if number and number not in _POOLINGS:
        raise ValueError(f"{key} = {number} is not supported")
    return _POOLINGS.get(number)


def gguf_tokenizer_config(fields: GgufFields, max_model_len: object) -> Json:
    tokens = fields.texts("tokenizer.ggml.tokens")
    config: Json = {
        f"{name}_token": tokens[fields.special[key]] for name, key in SPECIAL.items() if key in fields.special
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
