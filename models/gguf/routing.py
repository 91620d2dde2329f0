"""The choice of a token's experts, as config.json tells it, of a GGUF file's fields.

llama.cpp knows of some architectures by its code alone whether the weights of a token's experts add up to 1
(`src/models/`: `build_moe_ffn`).
"""

from __future__ import annotations

from collections.abc import Callable

from .model_file import Json, ModelFile
from .windows import windows

_SIGMOID = (0, 2)  # of `expert_gating_func`; 0: what llama.cpp takes for the architecture


def routing_fields(file: ModelFile) -> Json:
    """Return what DeepSeek-V3 and all that are like it have of their experts' choice. Raises ValueError."""
    key = file.fields.of_model("expert_gating_func")
    if (scoring := file.fields.integer(key, 0)) not in _SIGMOID:
        raise ValueError(f"{key} = {scoring} is not supported: experts of this architecture are scored by sigmoid")
    return chosen_fields(file)


def chosen_fields(file: ModelFile) -> Json:
    """Return what such a file tells of its experts, however they are scored."""
    return {
        "n_shared_experts": file.integer("expert_shared_count", 0),
        "first_k_dense_replace": file.integer("leading_dense_block_count", 0),
        "routed_scaling_factor": file.number("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": file.fields.flag(file.fields.of_model("expert_weights_norm"), default=False),
        "n_group": max(1, file.integer("expert_group_count", 0)),
        "topk_group": max(1, file.integer("expert_group_used_count", 0)),
    }


def shared_size(file: ModelFile, name: str) -> Json:
    """Return the inner columns of the expert that every token takes, as `name` has them."""
    found = file.shapes.get("blk.0.ffn_up_shexp.weight", (0,))[0]
    return {name: file.integer("expert_shared_feed_forward_length", found)}


def _qwen2_moe(file: ModelFile) -> Json:
    size = shared_size(file, "shared_expert_intermediate_size")
    return {"norm_topk_prob": False, "qkv_bias": file.config["attention_bias"], **size}


def _glm4_moe(file: ModelFile) -> Json:
    return routing_fields(file) | {"use_qk_norm": file.has("attn_q_norm.weight")}


def _dots1(file: ModelFile) -> Json:
    return routing_fields(file) | {"use_sliding_window": False}


def _minimax(file: ModelFile) -> Json:
    routing_fields(file)  # raises where they are scored otherwise
    return {"scoring_func": "sigmoid"}


def _ernie_moe(file: ModelFile) -> Json:
    """Return ERNIE's: softmax, and what moves the choice alone."""
    step = file.integer("interleave_moe_layer_step", 1)
    return chosen_fields(file) | {"use_bias": file.config["attention_bias"], "moe_layer_interval": step}


def _exaone_moe(file: ModelFile) -> Json:
    return routing_fields(file) | windows(file)


SPARSE_FIELDS: dict[str, Callable[[ModelFile], Json]] = {
    "dots1": _dots1,
    "ernie4_5-moe": _ernie_moe,
    "exaone-moe": _exaone_moe,
    "glm4moe": _glm4_moe,
    "hunyuan-moe": lambda file: {"n_shared_experts": file.integer("expert_shared_count", 1)},
    "minimax-m2": _minimax,
    "olmoe": lambda _: {"norm_topk_prob": False},
    "qwen2moe": _qwen2_moe,
}
