"""The families of models that run: one decoder, and a line for each family that says how it differs from it.

A family of known parts takes its entry in FAMILIES and nothing else. What one needs that no other has is a block
(`engine/nn/blocks.py`), and a field here that chooses it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from .experts import ExpertTraits

Bias = bool | str  # whether there is one, or the flag of config.json that says so
# Which layers see a window of keys alone: none; each, if a window is given; those that `layer_types` names, if
# `use_sliding_window` is set.
Windows = Literal["none", "every", "flagged"]

_TASK = "ForCausalLM"
_ALIKE = 0.6  # of two names: difflib's own measure; below, names of strangers share as many letters


@dataclass(slots=True, frozen=True, kw_only=True)
class Family:
    """A family says how it differs from a Llama without biases."""

    name: str  # the `model_type` of its config.json
    head_dim: int | None = None  # where config.json tells none; None: the hidden size's share
    qkv_bias: Bias = False
    o_bias: Bias = False
    mlp_bias: Bias = False
    qk_norm: bool = False  # of each query's and key's head
    windows: Windows = "none"
    window: int | None = 4096  # keys, where config.json tells none; None: all
    experts: ExpertTraits | None = None  # in some or all layers


FAMILIES = {
    "LlamaForCausalLM": Family(name="llama", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Family(name="mistral", windows="every"),
    "Qwen2ForCausalLM": Family(name="qwen2", qkv_bias=True, windows="flagged"),
    "Qwen3ForCausalLM": Family(
        name="qwen3",
        head_dim=128,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        windows="flagged",
    ),
    "MixtralForCausalLM": Family(
        name="mixtral",
        windows="every",
        window=None,
        experts=ExpertTraits(module="block_sparse_moe", parts=("w1", "w3", "w2"), normalised=True),
    ),
    "Qwen3MoeForCausalLM": Family(
        name="qwen3_moe",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        windows="flagged",
        experts=ExpertTraits(),
    ),
}


def architecture_of(model_type: object) -> str | None:
    """Return the architecture of a family by its name."""
    return next((name for name, family in FAMILIES.items() if family.name == model_type), None)


def nearest(name: str) -> str | None:
    """Return the known architecture whose name is most like another's; None where none is."""
    stems = {known.removesuffix(_TASK).lower(): known for known in FAMILIES}
    found = difflib.get_close_matches(name.removesuffix(_TASK).lower(), stems, n=1, cutoff=_ALIKE)
    return stems[found[0]] if found else None
