"""A checkpoint's word about its model: `config.json` and `generation_config.json`, read once and checked.

How families differ is a table (`families/table.py`); what a single checkpoint chooses is read here. Anything that this
engine would compute wrongly is refused here by name, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..common.errors import ConfigError
from .architecture import read_architecture
from .families.family import Bias, Family, NormNames
from .families.table import FAMILIES
from .heads import has_other_head, lacks_head
from .parts.activation import Activation, read_activation
from .parts.config_fields import ConfigFields, count_draft_layers, read_end_ids
from .parts.experts import ExpertsConfig, read_experts, read_sparse_layers
from .parts.factors import read_factors
from .parts.latent import LatentConfig, read_latent
from .parts.lone_blocks import Block, read_blocks
from .parts.rank_counts import KV_HEADS, check_size, possible_sizes
from .parts.rope import RopeConfig, read_max_len, read_ropes, read_unturned, read_windows
from .parts.short_convolutions import inner_size
from .parts.side_by_side import Multipliers, read_multipliers
from .parts.state_kinds import read_states
from .parts.states import StatesConfig
from .parts.uneven_heads import Heads, LayerInputs, UnevenHeads, read_layer_inputs, read_uneven
from .quantization import Quantization
from .quantization_config import MODELOPT_FILE, read_quantization, with_modelopt
from .stored.json_files import read_json
from .stored.safetensors import stored_dtype
from .tokenizer_files import read_end_tokens

_DTYPES = ("float32", "bfloat16", "float16")
_HEAD_NORM_FLAGS: dict[str, Bias] = {"none": False, "bare": False, "flagged": "use_qk_norm"}  # of others: True


@dataclass(slots=True, frozen=True, kw_only=True)
class ModelConfig:
    """The decoder's shape and flags, of the whole model (not of one rank)."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_model_len: int  # positions that the checkpoint declares: `read_max_len`
    rope: RopeConfig
    rms_norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    sliding_windows: tuple[int | None, ...]  # for each layer: keys that a token sees, itself included; None: all
    eos_token_ids: frozenset[int]
    dtype: str  # of the checkpoint
    quantization: Quantization | None = None  # of its matrices; None: plain numbers
    num_draft_layers: int = 0  # of the checkpoint, behind the model's own: they predict further tokens and are not read
    latent: LatentConfig | None = None  # attention over latents, each the one KV head; None: over heads
    uneven: UnevenHeads | None = None  # `num_kv_heads` and `head_dim` are of some layers; None: of all
    layer_inputs: LayerInputs | None = None  # of each layer, besides the residual stream
    states: StatesConfig | None = None  # of layers that keep one; None: all keep keys and values
    experts: ExpertsConfig | None = None  # of the sparse layers
    sparse_layers: tuple[bool, ...] = ()  # by layer: experts take the place of the gated MLP
    blocks: tuple[Block, ...] = ()  # by layer, where each has one; nothing: all have a mixer and a feed-forward
    family: Family = FAMILIES["LlamaForCausalLM"]
    local_rope: RopeConfig | None = None  # of `local_layers`; None: `rope`
    local_layers: tuple[bool, ...] = ()  # by layer: those with a window, or those that turn no positions
    activation: Activation = "silu"
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what a block adds to the residual stream
    multipliers: Multipliers = Multipliers()  # within layers
    logits_divisor: float = 1.0
    score_scale: float | None = None  # of a query's product with a key; None: by the head's size
    score_cap: float | None = None  # what scores come near to and never reach
    logits_cap: float | None = None
    has_head: bool = True  # False: an embedding model; for the logits of a step, which mean nothing, heads are tied

    @classmethod
    def from_dir(cls, model_dir: Path) -> ModelConfig:
        """Raises ConfigError with the file's name and the value that does not fit."""
        if not (path := model_dir / "config.json").is_file():
            raise ConfigError(f"{path} is missing: a model is a local Hugging Face directory")
        generation = read_json(model_dir / "generation_config.json", default={})
        raw = with_modelopt(read_json(path), read_json(model_dir / MODELOPT_FILE, default={}))
        config = _parse(ConfigFields(path, raw), generation)
        if not config.tie_embeddings and lacks_head(model_dir):
            config = replace(config, tie_embeddings=True, has_head=False)
        elif config.tie_embeddings and has_other_head(model_dir):
            config = replace(config, tie_embeddings=False)
        # Chats that were taught to a base model end by the tokenizer's token; the other files often stay the base's.
        ends = {end for end in read_end_tokens(model_dir) if end < config.vocab_size}
        return replace(config, eos_token_ids=config.eos_token_ids | ends)

    def heads_of(self, layer: int) -> Heads:
        """Return the heads of a layer's keys and values; `dim` is that of its queries, too."""
        return Heads(self.num_kv_heads, self.head_dim) if self.uneven is None else self.uneven.of(layer)

    @property
    def page_heads(self) -> Heads:
        """Return what a page has of a token."""
        return Heads(self.num_kv_heads, self.head_dim) if self.uneven is None else self.uneven.page

    @property
    def rotary_dim(self) -> int:
        """Count the numbers of a head that positions turn, all or some of them; of local layers `head_dim`'s."""
        if self.uneven is not None:
            return self.uneven.wide.dim
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def num_kv_parts(self) -> int:
        """Count what is kept of each KV head of a token: key and value, or a latent, which is both."""
        return 2 if self.latent is None else 1

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """List the layers that keep keys and values, or latents."""
        if self.uneven is not None:
            return tuple(range(self.uneven.num_kept))
        keeps_keys = self.states.keeps_keys if self.states is not None else self.has_mixer
        return tuple(layer for layer in range(self.num_layers) if self.has_mixer(layer) and keeps_keys(layer))

    def has_mixer(self, layer: int) -> bool:
        """Tell whether tokens meet those before them in a layer."""
        return not self.blocks or self.blocks[layer] == "mixer"

    def has_state(self, layer: int) -> bool:
        """Tell whether a layer's mixer keeps a state, in place of keys and values or beside them."""
        return self.states is not None and self.states.layers[layer]

    def has_feed_forward(self, layer: int) -> bool:
        """Tell whether a layer computes something of each token by itself."""
        return not self.blocks or self.blocks[layer] == "feed-forward"

    def norm_names(self, layer: int) -> NormNames:
        """Return the names of a layer's norms: `Family.norm_names`, of the blocks that it has."""
        before, behind, before_fed, behind_fed = self.family.norm_names
        if not self.has_mixer(layer):
            before = behind = None
        if not self.has_feed_forward(layer):
            before_fed = behind_fed = None
        return before, behind, before_fed, behind_fed

    def page_of(self, layer: int) -> int | None:
        """Return which of a block's keys and values, its pages mostly, a layer reads; None: a state, or nothing."""
        lender = layer if self.uneven is None else self.uneven.lender(layer)
        return layers.index(lender) if lender in (layers := self.kv_layers) else None

    @property
    def num_kv_pages(self) -> int:
        """Count the pages of a block that have keys and values."""
        return len(self.kv_layers) if self.uneven is None else self.uneven.num_pages

    def pages_behind(self, layer: int) -> tuple[int, ...]:
        """Return the pages of keys and values that are complete once a layer is computed, and were not before."""
        if self.uneven is not None:
            return self.uneven.pages_behind(layer)
        page = self.page_of(layer)
        return () if page is None else (page,)

    @property
    def kv_windows(self) -> tuple[int | None, ...]:
        """Return of each layer that keeps keys the keys that a token sees, itself included; None: all."""
        return tuple(self.sliding_windows[layer] for layer in self.kv_layers)

    @property
    def weights_form(self) -> str:
        """Return the name by which workers tell their weights' forms apart."""
        return self.quantization.name if self.quantization is not None else "plain"

    def shared_counts(self, *, whole_experts: bool = False) -> dict[str, int]:
        """Return what ranks share, by its name in config.json; with whole experts, the number of these."""
        counts = {"num_attention_heads": self.num_qo_heads}
        if self.latent is None:  # else every rank has the one head
            counts[KV_HEADS] = self.num_kv_heads
        if self.uneven is not None:
            counts["num_global_key_value_heads"] = self.uneven.wide.num_kv
        if self.layer_inputs is not None:
            counts["hidden_size_per_layer_input"] = self.layer_inputs.size
        if self.states is not None:
            counts["shares of a state"] = self.states.num_shares
        if any(map(self.has_mlp, range(self.num_layers))):
            counts["intermediate_size"] = self.intermediate_size
        if self.experts is not None:
            counts |= self.experts.shared_counts(whole_experts=whole_experts)
        return counts

    def inner_size(self, layer: int) -> int:
        """Count the inner columns of a layer's MLP."""
        return self.intermediate_size * (1 if self.uneven is None else self.uneven.mlp_factor(layer))

    def has_mlp(self, layer: int) -> bool:
        experts = self.experts_of(layer)
        return self.has_feed_forward(layer) and (experts is None or experts.are_beside_mlp)

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """Return the experts that take the place of a layer's gated MLP, or are beside it, if it has any."""
        return self.experts if self.experts is not None and self.sparse_layers[layer] else None

    @property
    def longest_model_len(self) -> int:
        """Count the positions that the rotary embedding covers: more than declared where its scaling allows more."""
        ropes = [self.rope] if self.local_rope is None else [self.rope, self.local_rope]
        return max(self.max_model_len, *(int(rope.factor * rope.original_max_len) for rope in ropes))

    def check_length(self, asked: int | None) -> None:
        """Check that the model has so many positions. Raises ConfigError."""
        if asked is not None and asked > self.longest_model_len:
            raise ConfigError(f"max_model_len: {asked} is more than the model's {self.longest_model_len}")

    def check_tp_size(self, tp_size: int, *, whole_experts: bool = False) -> None:
        """Check that ranks can share the model. Raises ConfigError."""
        check_size(self.shared_counts(whole_experts=whole_experts), tp_size, copies_heads=self._copies_heads)

    def tp_sizes(self, *, whole_experts: bool) -> list[int]:
        """List the numbers of ranks that can share the model."""
        return possible_sizes(self.shared_counts(whole_experts=whole_experts), copies_heads=self._copies_heads)

    @property
    def _copies_heads(self) -> bool:
        """Tell whether ranks may have the same KV head: not where a norm is of all heads, or states lie with them."""
        return not (self.states or self.uneven or (self.qk_norm and self.family.head_norms == "whole"))


def _parse(fields: ConfigFields, generation: Mapping[str, object]) -> ModelConfig:
    architecture, family, fields = read_architecture(fields)
    hidden_size = fields.count("hidden_size")
    num_qo_heads = fields.count("num_attention_heads")
    num_kv_heads = fields.count(KV_HEADS, num_qo_heads)
    if num_qo_heads % num_kv_heads:
        raise fields.refuse(KV_HEADS, f"must divide num_attention_heads = {num_qo_heads}")
    head_dim = fields.count("head_dim", hidden_size // num_qo_heads)
    latent = read_latent(fields) if family.is_latent else None
    if latent is not None:
        num_kv_heads, head_dim = 1, latent.token_size
    elif head_dim % 2 or not head_dim:
        raise fields.refuse("head_dim", f"the head size {head_dim} must be even, and not 0: positions turn pairs")
    max_model_len = read_max_len(fields)
    windows, unturned = read_windows(fields, family), read_unturned(fields, family)
    uneven = read_uneven(fields, family, Heads(num_kv_heads, head_dim), num_qo_heads, windows)
    rotary_dim = head_dim if latent is None else latent.rope_dim
    rope, local_rope = read_ropes(fields, family, max_model_len, rotary_dim, has_windows=fields.has("sliding_window"))
    return ModelConfig(
        architecture=architecture,
        num_layers=fields.count("num_hidden_layers"),
        hidden_size=hidden_size,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=inner_size(fields, family),
        vocab_size=fields.count("vocab_size"),
        max_model_len=max_model_len,
        rope=rope,
        rms_norm_eps=fields.number(fields.told(("rms_norm_eps", "layer_norm_eps", "norm_eps")), 1e-6),
        qkv_bias=_has(fields, family.qkv_bias),
        o_bias=_has(fields, family.o_bias),
        mlp_bias=_has(fields, family.mlp_bias),
        qk_norm=_has(fields, _HEAD_NORM_FLAGS.get(family.head_norms, True)),
        tie_embeddings=fields.flag(fields.told(("tie_embedding", "tie_word_embeddings")), default=False),
        sliding_windows=windows,
        local_layers=unturned or tuple(window is not None for window in windows),
        eos_token_ids=read_end_ids(fields, generation),
        dtype=_dtype(fields),
        quantization=read_quantization(fields),
        num_draft_layers=count_draft_layers(fields),
        latent=latent,
        uneven=uneven,
        layer_inputs=read_layer_inputs(fields, family),
        states=read_states(fields, family, num_kv_heads),
        experts=read_experts(fields, family.experts),
        sparse_layers=read_sparse_layers(fields, family.experts),
        blocks=read_blocks(fields) if family.has_lone_blocks else (),
        family=family,
        local_rope=local_rope,
        activation=read_activation(fields, family),
        multipliers=read_multipliers(fields, family),
        has_head=True,
        **read_factors(fields, family, hidden_size, latent),
    )


def _has(fields: ConfigFields, bias: Bias) -> bool:
    return fields.flag(bias, default=False) if isinstance(bias, str) else bias


def _dtype(fields: ConfigFields) -> str:
    value = fields.raw.get("dtype") or fields.raw.get("torch_dtype") or "auto"
    if value == "auto":  # what a library may be asked for, saved by mistake: nothing is told
        return stored_dtype(fields.path.parent) or "float32"
    if value not in _DTYPES:
        raise ConfigError(f"{fields.path}: dtype {value!r} is not supported; these are: {', '.join(_DTYPES)}")
    return str(value)
