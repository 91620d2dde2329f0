"""Fields of a GGUF file that single families have beyond what all have, as config.json has them."""

from __future__ import annotations

from collections.abc import Callable

from .latent import growing_fields, latent_fields
from .model_file import Json, ModelFile
from .multipliers import granite_fields, turns_positions
from .rope import LLAMA3_FACTORS
from .routing import SPARSE_FIELDS
from .state_fields import STATE_FIELDS
from .windows import windows

_LLAMA4_PERIOD, _LLAMA4_CHUNK = 4, 8192  # layers, the last of which sees everything; tokens
_MAVERICK_EXPERTS = 128  # of the Llama 4 that does not norm its heads
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}  # layers of the models whose scores go by the hidden size


def _gemma(file: ModelFile) -> Json:
    """Return a Gemma's own fields. The scale of scores is known by the number of layers alone, as in llama.cpp."""
    caps = {
        name: file.number(name)
        for name in ("attn_logit_softcapping", "final_logit_softcapping")
        if file.fields.find(file.fields.of_model(name)) not in (None, 0.0)
    }
    is_27b = file.config["num_hidden_layers"] == _GEMMA_27B[file.fields.architecture]
    found: Json = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": (
            file.config["hidden_size"] // file.config["num_attention_heads"] if is_27b else file.config["head_dim"]
        ),
        **caps,  # what a file does not tell is its family's
        **windows(file),
    }
    if file.fields.architecture == "gemma2":
        return found | ({} if found["sliding_window"] else {"sliding_window": 4096})  # older files tell none
    full = {"rope_type": "default", "rope_theta": file.config["rope_theta"], **(file.config["rope_scaling"] or {})}
    local = file.number("rope.freq_base_swa", 10_000.0)
    return found | {
        "rope_scaling": None,
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _gemma4(file: ModelFile) -> Json:
    """Return Gemma 4's own fields: heads of two sizes, and what later layers borrow and are given."""
    num_layers = file.config["num_hidden_layers"]
    found = windows(file)
    narrow, wide = (
        [layer for layer, kind in enumerate(found["layer_types"]) if kind == f"{name}_attention"]
        for name in ("sliding", "full")
    )
    heads = file.fields.of_layers("attention.head_count_kv", num_layers, 0)
    sizes = file.fields.of_layers("feed_forward_length", num_layers, 0)
    turned = [factor == 1.0 for factor in file.factors.get(LLAMA3_FACTORS, [])]
    if not turned or turned != sorted(turned, reverse=True):
        raise ValueError(f"{LLAMA3_FACTORS} does not say which pairs are turned")
    theta, inputs = file.config["rope_theta"], file.shapes.get("per_layer_token_embd.weight", (0,))
    full = {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": sum(turned) / len(turned)}
    local = {"rope_type": "default", "rope_theta": file.number("rope.freq_base_swa", 10_000.0)}
    return found | {
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": file.number("final_logit_softcapping", 0.0) or None,
        "num_key_value_heads": heads[narrow[0]],
        "num_global_key_value_heads": heads[wide[0]],
        "global_head_dim": file.fields.count("attention.key_length"),
        "attention_k_eq_v": not file.of_layer(wide[0], "attn_v"),
        "intermediate_size": sizes[0],
        "use_double_wide_mlp": max(sizes) > sizes[0],
        "enable_moe_block": file.has("ffn_gate_inp.weight"),
        "top_k_experts": file.config.get("num_experts_per_tok"),
        "num_kv_shared_layers": file.integer("attention.shared_kv_layers", 0),
        "hidden_size_per_layer_input": file.integer("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": inputs[0] or None,
        "partial_rotary_factor": 1.0,
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
    }


def _granite(file: ModelFile) -> Json:
    if not turns_positions(file):
        raise ValueError("a Granite without rotary positions is not supported")
    return granite_fields(file)


def _gpt_oss(file: ModelFile) -> Json:
    """Return gpt-oss's own fields. Its yarn is not rounded to whole frequencies, which no field tells."""
    found = windows(file)
    found["intermediate_size"] = file.fields.count("expert_feed_forward_length")
    if file.config["rope_scaling"] is not None:
        found["rope_scaling"] = file.config["rope_scaling"] | {"truncate": False}
    return found


def _olmo(file: ModelFile) -> Json:
    """Return OLMo 3's own fields: layers with a window have no scaling. OLMo 2, the same without windows, has none."""
    of_layers = windows(file)
    if of_layers["sliding_window"] is None:
        return {}
    plain = {"rope_type": "default", "rope_theta": file.config["rope_theta"]}
    return of_layers | {
        "rope_scaling": None,
        "rope_parameters": {
            "full_attention": plain | (file.config["rope_scaling"] or {}),
            "sliding_attention": plain,
        },
    }


def _phi3(file: ModelFile) -> Json:
    return {"sliding_window": file.integer("attention.sliding_window", 0) or None}


def _cohere(file: ModelFile) -> Json:
    return windows(file) | {"logit_scale": file.number("logit_scale")}


def _ministral(file: ModelFile) -> Json:
    """Return Ministral 3's own fields: how queries grow, and that its yarn leaves their length as it is."""
    rope, scale = file.config["rope_scaling"], file.number("attention.temperature_scale", 0.0)
    if rope is None or not scale:
        return {}
    mscale = file.number("rope.scaling.yarn_log_multiplier", 0.0)
    same = {"mscale": mscale, "mscale_all_dim": mscale} if mscale else {}
    return {"rope_scaling": rope | same | {"llama_4_scaling_beta": scale}}


def _llama4(file: ModelFile) -> Json:
    """Return Llama 4's own fields: most of them are in llama.cpp's code alone (`src/models/llama4.cpp`)."""
    num_layers, window = file.config["num_hidden_layers"], file.fields.of_model("attention.sliding_window")
    if file.fields.find(window) == 0:
        raise ValueError(f"{window} = 0: a Llama 4 none of whose layers attend in chunks is not supported")
    kinds = windows(file)["layer_types"]
    turned = [int((layer + 1) % _LLAMA4_PERIOD != 0) for layer in range(num_layers)]
    if [kind == "sliding_attention" for kind in kinds] != [bool(each) for each in turned]:
        raise ValueError(f"{window}_pattern: all but each {_LLAMA4_PERIOD}th layer attend in chunks and turn positions")
    return {
        "attention_chunk_size": _LLAMA4_CHUNK,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "floor_scale": _LLAMA4_CHUNK,
        "interleave_moe_layer_step": file.fields.count("interleave_moe_layer_step"),
        "intermediate_size": file.fields.count("expert_feed_forward_length"),
        "intermediate_size_mlp": file.config["intermediate_size"],
        "no_rope_layers": turned,
        "use_qk_norm": file.config["num_experts"] != _MAVERICK_EXPERTS,
    }


def _glm4(file: ModelFile) -> Json:
    if file.fields.find(key := file.fields.of_model("rope.dimension_sections")) is not None:
        raise ValueError(f"{key}: heads in the order of images are not supported")
    return {}


def _seed_oss(file: ModelFile) -> Json:
    return {"attention_out_bias": "blk.0.attn_output.bias" in file.shapes}


def _ernie(file: ModelFile) -> Json:
    return {"use_bias": file.config["attention_bias"]}


OWN_FIELDS: dict[str, Callable[[ModelFile], Json]] = {
    **SPARSE_FIELDS,
    **STATE_FIELDS,
    "cohere2": _cohere,
    "deepseek2": latent_fields,
    "ernie4_5": _ernie,
    "exaone4": windows,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "gemma4": _gemma4,
    "glm4": _glm4,
    "gpt-oss": _gpt_oss,
    "granite": _granite,
    "granitemoe": _granite,
    "llama4": _llama4,
    "mistral3": _ministral,
    "mistral4": growing_fields,
    "olmo2": _olmo,
    "phi3": _phi3,
    "seed_oss": _seed_oss,
}
