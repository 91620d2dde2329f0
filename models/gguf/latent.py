"""Latent attention of a GGUF file (DeepSeek, Mistral 4): its sizes, and what makes keys and values of latents.

Newer files have these as llama.cpp multiplies by them, of each head by itself, and tell of keys and values as wide as
what is kept of a token; older ones have a checkpoint's one matrix, and the widths of heads.

    attn_k_b [heads, kv_rank, nope_dim], attn_v_b [heads, value_dim, kv_rank]   ->   kv_b_proj, both of a head below it
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from .fields import GgufFields
from .model_file import Json, ModelFile
from .routing import chosen_fields
from .tensors import PLAIN, Part, StoredTensor, to_bfloat16

if TYPE_CHECKING:
    from .tensors import Array

HALVES = ("attn_k_b", "attn_v_b")
_SOFTMAX, _SIGMOID = (0, 1), 2  # of `expert_gating_func`: V2's, whose files may tell none, and V3's
# llama.cpp's converter stores a tenth of a checkpoint's `mscale_all_dim`, which is its `mscale` in all published ones.
_MSCALE = 10
# By what the queries of all published Mistral 4 grow; llama.cpp's converter does not tell it, so there they do not.
_GROWTH = 0.1


def has_sigmoid(fields: GgufFields) -> bool:
    """Tell whether experts are scored as DeepSeek-V3's are."""
    return fields.integer(fields.of_model("expert_gating_func"), 0) == _SIGMOID


def latent_fields(file: ModelFile) -> Json:
    """Return a DeepSeek's own fields of config.json. Raises ValueError."""
    is_v3 = has_sigmoid(file.fields)
    if not is_v3:
        _check_softmax(file)
    found = _sizes_and_routing(file)
    if found["norm_topk_prob"] and not is_v3:
        named = file.fields.of_model("expert_weights_norm")
        raise ValueError(f"{named} = True is not supported with scores of softmax")
    return found | {"topk_method": "noaux_tc" if is_v3 else "group_limited_greedy"}


def growing_fields(file: ModelFile) -> Json:
    """Return a Mistral 4's own fields: a DeepSeek's, and how its queries grow. Raises ValueError."""
    _check_softmax(file)
    found = _sizes_and_routing(file)
    rope = found.get("rope_scaling", file.config["rope_scaling"])
    growth = file.number("attention.temperature_scale", _GROWTH)
    if rope is None or not growth:
        return found
    original = rope["original_max_position_embeddings"]
    if (length := file.integer("attention.temperature_length", original)) != original:
        named = file.fields.of_model("attention.temperature_length")
        raise ValueError(f"{named} = {length}: queries grow from the original context of {original} on")
    return found | {"rope_scaling": rope | {"llama_4_scaling_beta": growth}}


def _check_softmax(file: ModelFile) -> None:
    if (scoring := file.integer("expert_gating_func", 0)) not in _SOFTMAX:
        raise ValueError(f"{file.fields.of_model('expert_gating_func')} = {scoring} is not supported")


def _sizes_and_routing(file: ModelFile) -> Json:
    count = file.integer
    turned = count("rope.dimension_count")
    found: Json = chosen_fields(file) | {
        "num_key_value_heads": file.config["num_attention_heads"],
        "q_lora_rank": count("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": count("attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": count("attention.key_length_mla", count("attention.key_length")) - turned,
        "v_head_dim": count("attention.value_length_mla", count("attention.value_length")),
        "n_routed_experts": file.config["num_experts"],
    }
    log_multiplier = file.number("rope.scaling.yarn_log_multiplier", 0.0)
    if file.config["rope_scaling"] is not None and log_multiplier:
        mscale = round(_MSCALE * log_multiplier, 6)
        found["rope_scaling"] = file.config["rope_scaling"] | {"mscale": mscale, "mscale_all_dim": mscale}
    return found


def latent_tensors(halves: Mapping[str, Mapping[str, Part]], kept: Collection[str]) -> Iterator[StoredTensor]:
    """Yield the `kv_b_proj` of each layer, in plain numbers, as it is multiplied by. Raises ValueError.

    `halves`: by layer. Of plain ones no number is rounded where kinds are `kept`.
    """
    for layer, parts in halves.items():
        if parts.keys() != set(HALVES):
            raise ValueError(f"blk.{layer} has {', '.join(parts)} and needs {' and '.join(HALVES)}")
        keys, values = (parts[name] for name in HALVES)
        heads, kv_rank, nope_dim = keys.shape
        shape = (heads * (nope_dim + values.shape[1]), kv_rank)
        is_exact = bool(kept) and {keys.kind, values.kind} <= set(PLAIN)
        name = f"model.layers.{layer}.self_attn.kv_b_proj.weight"
        numbers = partial(_joined, keys, values, is_exact=is_exact)
        yield StoredTensor(name, "F32" if is_exact else "BF16", shape, numbers)


def _joined(keys: Part, values: Part, *, is_exact: bool) -> Iterator[Array]:
    """Yield both matrices of one head after the other."""
    import numpy as np

    for key, value in zip(keys.rows, values.rows, strict=True):
        both = np.concatenate((replace(keys, rows=key).numbers().T, replace(values, rows=value).numbers()))
        yield np.ascontiguousarray(both, np.float32) if is_exact else to_bfloat16(both)
