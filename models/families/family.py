"""A family of models differs from others in these fields alone: one decoder runs them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from .experts import ExpertTraits

Bias = bool | str  # whether there is one, or the flag of config.json that says so
# Where a layer's norms stand: before mixer and feed-forward, behind them, or both; or one for both.
Norms = Literal["before", "behind", "both", "shared"]
# Of queries and keys: none, of each head, of each where `use_qk_norm` says so, of each once it is turned by positions,
# or of a token's whole projection; or, without weights, of each once it is turned, in layers that turn some.
HeadNorms = Literal["none", "head", "flagged", "turned", "whole", "bare"]
# Which layers see a window of keys alone, if there is a window: none; each; with `use_sliding_window` each, or those
# that `layer_types` names; those that `layer_types` names, or else all but each `sliding_window_pattern`th; or chunks.
Windows = Literal["none", "every", "every flagged", "flagged", "typed", "chunks"]
# Which layers turn nothing by positions: none; those that `no_rope_layers` names; where a window's size is told, those
# without one; those that have no window; all, unless `position_embedding_type` is "rope".
Unturned = Literal["none", "named", "beside windows", "without window", "untyped"]
# What a checkpoint has in one tensor: nothing; gate and up; these, and q, k and v in another.
Fusion = Literal["none", "mlp", "all"]
# What layers that keep a state are. Of grouped delta nets a checkpoint has the inputs head by head in one tensor.
States = Literal["delta nets", "grouped delta nets", "short convolutions", "mamba"]
NormNames = tuple[str | None, str | None, str | None, str | None]

# The norms before the mixer, behind it, before the feed-forward and behind it, as a checkpoint names them.
_NORM_NAMES: dict[Norms, NormNames] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "behind": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "shared": ("input_layernorm", None, None, None),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


class MlpNames(NamedTuple):
    """A dense layer's MLP has these names in a checkpoint."""

    module: str = "mlp"
    fused: str = "gate_up_proj"  # gate and up in one tensor
    down: str = "down_proj"
    size: str = "intermediate_size"  # its inner columns in config.json
    gate: str | None = "gate_proj"  # None: the activation is of `up` alone
    up: str = "up_proj"
    is_adjusted: bool = False  # `size` is told of an MLP without a gate: `parts/short_convolutions.py`

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of its matrices, the one behind the activation last."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)


@dataclass(slots=True, frozen=True, kw_only=True)
class Family:
    """A family says how it differs from a Llama without biases."""

    name: str  # the `model_type` of its config.json
    defaults: Mapping[str, object] = field(default_factory=dict, hash=False)  # what config.json need not tell
    norms: Norms = "before"
    own_norm_names: NormNames | None = None  # in place of those that others have
    has_layer_norms: bool = False  # what is normed has its mean taken off first
    norm_offset: float = 0.0  # what a norm's weights stand below the factors that they mean
    head_norms: HeadNorms = "none"
    head_norm_names: tuple[str, str] = ("q_norm", "k_norm")
    qkv_bias: Bias = False
    o_bias: Bias = False
    mlp_bias: Bias = False
    fusion: Fusion = "none"
    mlp: MlpNames = MlpNames()
    activation_key: str = "hidden_act"  # in config.json
    has_sinks: bool = False  # a weight of each head that no token's value goes with
    output_name: str = "o_proj"  # of the matrix behind attention
    attention: str = "self_attn"  # the module of attention in a layer
    has_lone_blocks: bool = False  # a layer is a mixer, or a feed-forward, not both: `parts/lone_blocks.py`
    final_norm: str = "norm"
    states: States | None = None  # some layers keep one in place of keys and values: `parts/states.py`
    attends_beside_states: bool = False  # all keep one, and keys and values besides: `parts/side_by_side.py`
    has_attention_gates: bool = False  # numbers beside each head's query multiply what it attends to
    is_latent: bool = False  # attention is over latents: `latent.py`
    windows: Windows = "none"
    experts: ExpertTraits | None = None  # in some or all layers
    has_wide_layers: bool = False  # those without a window have heads of another size: `parts/uneven_heads.py`
    norms_values: bool = False  # of each head, without weights
    has_layer_factors: bool = False  # a number of each layer multiplies the residual stream behind it
    has_local_rope: bool = False  # layers with a window turn positions by another base
    has_partial_rope: bool = False  # config.json may leave a part of each head unturned
    has_alpha: bool = False  # rotary scaling that is called dynamic may have one, and is fixed then
    has_neighbours: bool = False  # a turned pair's two numbers are neighbours, not half a head apart
    unturned: Unturned = "none"
    scales_queries: bool = False  # by their positions, where `llama_4_scaling_beta` says how much
    scales_embeddings: bool = False  # by the root of their size
    has_multipliers: bool = False  # of embeddings, residual stream, scores and logits, in Granite's words
    has_logit_scale: bool = False  # logits are multiplied by `logit_scale`
    has_score_scale: bool = False  # by `query_pre_attn_scalar` in place of the head's size; and caps

    @property
    def norm_names(self) -> NormNames:
        """Return the names of a layer's norms: before the mixer, behind it, before the feed-forward, behind it."""
        return self.own_norm_names or _NORM_NAMES[self.norms]
