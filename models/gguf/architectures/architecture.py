"""An architecture of GGUF files says how these differ from a Llama's: the tables beside it have one entry for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# What a sparse layer's experts become: a tensor for each matrix of each expert, or gpt-oss's stacks.
Experts = Literal["none", "single", "stacked"]
# Layers that keep a state: `states.py`. Value heads of delta nets stand in turns; of grouped ones a checkpoint has the
# inputs key head by key head.
States = Literal["none", "convolutions", "mamba", "delta nets", "grouped delta nets"]


@dataclass(slots=True, frozen=True, kw_only=True)
class Architecture:
    """One `general.architecture`, as far as its files differ from a Llama's."""

    family: str  # of a checkpoint: the name in config.json's `architectures`
    model_type: str
    layer: Mapping[str, str]  # a layer's tensors: names here, names in a checkpoint
    final_norm: str = "norm"
    activation: str = "silu"
    reads: tuple[str, ...] = ()  # fields beyond those that every architecture has: `config.py`
    permutes: bool = False  # rows of queries and keys: of each head's two halves in turn
    turns_parts: bool = False  # positions may turn a part of each head
    turns_fastest: bool = False  # the factors of its frequencies say which pairs are turned: `own_fields.py`
    norm_offset: float = 0.0  # what stands in the file over what a checkpoint has
    experts: Experts = "none"
    expert_module: str = "mlp"
    expert_parts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")  # of two: no gate
    is_latent: bool = False  # attention is over latents: `latent.py`
    states: States = "none"
    # What a checkpoint has in one tensor: the file's names in the order of its rows, and the checkpoint's name of each.
    fused: Mapping[str, str] = field(default_factory=dict)
