"""Layers whose keys and values are of two sizes, or another layer's, as Gemma 4's config.json tells them.

    narrow    layers with a window
    wide      the others; the value of a token may be its key, before that is normed and turned
    borrow    the last layers of either kind keep nothing: they read what the last one of their kind before them keeps

A block's pages are all of one size, that of the larger rows; of the smaller ones as many lie in a page as fill it. So
whoever moves, cuts, sums or keeps pages knows nothing of layers. Heads are cut between ranks at *places*: each has as
many of a narrow layer's heads, and of a wide one's, as any other.

    two places, a page   [ keys of place 0      ][ of 1      ][ values of place 0 ][ of 1 ]
    one large row        [ its head 0           ][ 1         ] ...
    two small ones       [ head 0, other's 0    ][ 1, 1      ] ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from ...common.config import EngineConfig
from ...common.errors import ConfigError
from ..families.family import Family
from .config_fields import ConfigFields

_FULL, _SLIDING = "full_attention", "sliding_attention"


class Heads(NamedTuple):
    """A layer keeps so many heads of so many numbers of a token as its key, and as many as its value."""

    num_kv: int
    dim: int

    @property
    def size(self) -> int:
        return self.num_kv * self.dim


class Spot(NamedTuple):
    """A layer's rows lie here in a block."""

    page: int
    slot: int  # of those that fill a page


@dataclass(slots=True, frozen=True, kw_only=True)
class UnevenHeads:
    """The heads of all layers, of the whole model."""

    narrow: Heads
    wide: Heads
    are_wide: tuple[bool, ...]  # by layer
    values_are_keys: bool = False  # of wide layers
    num_borrowing: int = 0  # of the layers, the last ones
    borrowers_are_double: bool = False  # their MLPs have twice as many inner columns

    def of(self, layer: int) -> Heads:
        return self.wide if self.are_wide[layer] else self.narrow

    def made(self, layer: int) -> str:
        """Return which of a token's query, key and value a layer has matrices for."""
        if self.borrows(layer):
            return "q"
        return "qk" if self.are_wide[layer] and self.values_are_keys else "qkv"

    @property
    def num_kept(self) -> int:
        """Count the layers that keep keys and values of their own: the first ones."""
        return len(self.are_wide) - self.num_borrowing

    def borrows(self, layer: int) -> bool:
        return layer >= self.num_kept

    def mlp_factor(self, layer: int) -> int:
        return 2 if self.borrowers_are_double and self.borrows(layer) else 1

    def lender(self, layer: int) -> int:
        """Return the layer whose keys and values a layer reads: itself, or one before it."""
        own = self.are_wide[layer]
        return max(i for i in range(min(layer + 1, self.num_kept)) if self.are_wide[i] == own)

    @property
    def page(self) -> Heads:
        """Return what a page has of a token: a head for each place."""
        num_places = math.gcd(self.narrow.num_kv, self.wide.num_kv)
        return Heads(num_places, max(self.narrow.size, self.wide.size) // num_places)

    def spot(self, layer: int) -> Spot:
        """Return where the rows of a layer lie."""
        return _spots(self)[layer]

    @property
    def num_pages(self) -> int:
        """Count the pages of a block."""
        return 1 + max(spot.page for spot in _spots(self).values())

    def pages_behind(self, layer: int) -> tuple[int, ...]:
        """Return the pages that are complete when a layer is computed, and were not before it."""
        if self.borrows(layer):
            return ()
        page = self.spot(layer).page
        is_last = layer == max(other for other, spot in _spots(self).items() if spot.page == page)
        return (page,) if is_last else ()


def made_parts(heads: UnevenHeads | None, layer: int) -> str:
    """Return which of a token's query, key and value a layer has matrices for."""
    return "qkv" if heads is None else heads.made(layer)


@cache
def _spots(heads: UnevenHeads) -> dict[int, Spot]:
    """Return the spot of each layer that keeps something. Pages are numbered as they are filled."""
    pages: list[list[int]] = []
    for own, is_wide in ((heads.narrow, False), (heads.wide, True)):
        layers = [layer for layer in range(heads.num_kept) if heads.are_wide[layer] == is_wide]
        count = heads.page.size // own.size
        pages += [layers[first : first + count] for first in range(0, len(layers), count)]
    pages.sort(key=lambda layers: layers[-1])
    return {layer: Spot(page, slot) for page, layers in enumerate(pages) for slot, layer in enumerate(layers)}


def in_common_words(fields: ConfigFields) -> ConfigFields:
    """Return what is told of such a model, with all that other families have other words for. Raises ConfigError."""
    num_layers, own = fields.count("num_hidden_layers", 30), dict[str, object]()
    kinds = fields.raw.get("layer_types")
    if kinds is None:
        kinds = [_SLIDING if (layer + 1) % 6 else _FULL for layer in range(num_layers)]
    if isinstance(kinds, list) and kinds and kinds[-1] == _SLIDING:
        kinds = [*kinds[:-1], _FULL]  # whatever is told, the last layer sees all keys
    own["layer_types"] = kinds
    if fields.raw.get("use_bidirectional_attention") == "vision":  # of what is seen, which is left out
        own["use_bidirectional_attention"] = None
    elif fields.has("use_bidirectional_attention"):
        raise fields.refuse("use_bidirectional_attention", "an answer's tokens see those before them alone")
    if fields.flag("enable_moe_block", default=False):
        own["num_experts_per_tok"] = fields.raw.get("top_k_experts")
    else:
        own["num_experts"] = 0
    return ConfigFields(fields.path, dict(fields.raw) | own | _wide_heads(fields, kinds))


def _wide_heads(fields: ConfigFields, kinds: object) -> dict[str, object]:
    """Return the sizes of wide layers in words of their own, where each layer is told of by its number."""
    told = fields.mapping("per_layer_config")
    if told is None or not isinstance(kinds, list):
        return {}
    wide = [layer for layer, kind in enumerate(kinds) if kind == _FULL]
    first, known = next(iter(told.raw.values()), None), {"head_dim", "num_key_value_heads"}
    numbers = sorted(int(key) if key.isdecimal() else -1 for key in told.raw)
    is_alike = isinstance(first, dict) and first.keys() <= known and all(each == first for each in told.raw.values())
    if not is_alike or numbers != wide:
        raise fields.refuse("per_layer_config", f"must have the same {sorted(known)} for each of the layers {wide}")
    assert isinstance(first, dict)
    sizes = {"head_dim": fields.raw.get("head_dim")} | first
    return {"global_head_dim": sizes["head_dim"], "global_heads": sizes.get("num_key_value_heads")}


def read_uneven(
    fields: ConfigFields, family: Family, narrow: Heads, num_qo_heads: int, windows: tuple[int | None, ...]
) -> UnevenHeads | None:
    """Return the heads of a family whose layers' differ. Raises ConfigError."""
    if not family.has_wide_layers:
        return None
    values_are_keys = fields.flag("attention_k_eq_v", default=False)
    key = "num_global_key_value_heads" if values_are_keys else "global_heads"
    num_kv = fields.count(fields.told(("global_heads", key)), narrow.num_kv)
    heads = UnevenHeads(
        narrow=narrow,
        wide=Heads(num_kv, fields.count("global_head_dim", 512)),
        are_wide=tuple(window is None for window in windows),
        values_are_keys=values_are_keys,
        num_borrowing=_num_borrowing(fields, windows),
        borrowers_are_double=fields.flag("use_double_wide_mlp", default=False),
    )
    if num_qo_heads % num_kv:
        raise fields.refuse(key, f"must divide num_attention_heads = {num_qo_heads}")
    if heads.wide.dim % 2:
        raise fields.refuse("global_head_dim", "must be even: rotary positions turn pairs")
    num_places, width = heads.page
    for own in (heads.narrow, heads.wide):
        own_width = own.size // num_places
        if width % own_width or own_width not in (own.dim, width):
            raise fields.refuse(
                "global_head_dim", f"rows of {heads.narrow} and of {heads.wide} do not fill pages of one size"
            )
    return heads


def _num_borrowing(fields: ConfigFields, windows: tuple[int | None, ...]) -> int:
    key = "num_kv_shared_layers"
    count = fields.count(key) if fields.raw.get(key) else 0
    kinds = [window is None for window in windows]
    if count >= len(kinds) or set(kinds[len(kinds) - count :]) - set(kinds[: len(kinds) - count]):
        raise fields.refuse(key, "leaves no layer of a kind before them to read from")
    return count


class LayerInputs(NamedTuple):
    """Each layer is given numbers of a token besides: looked up by its id, and made of its embedding."""

    size: int  # in one layer
    vocab_size: int

    def shapes(self, num_layers: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Return the tensors, by their names in a checkpoint."""
        width = num_layers * self.size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens_per_layer.weight": (self.vocab_size, width),
            "model.per_layer_model_projection.weight": (width, hidden_size),
            "model.per_layer_projection_norm.weight": (self.size,),
        }
        for layer in range(num_layers):
            name = f"model.layers.{layer}"
            shapes |= {
                f"{name}.per_layer_input_gate.weight": (self.size, hidden_size),
                f"{name}.per_layer_projection.weight": (hidden_size, self.size),
                f"{name}.post_per_layer_input_norm.weight": (hidden_size,),
            }
        return shapes


def read_layer_inputs(fields: ConfigFields, family: Family) -> LayerInputs | None:
    """Return what layers are given besides, in a family that has such inputs. Raises ConfigError."""
    key = "hidden_size_per_layer_input"
    if not family.has_wide_layers or fields.raw.get(key) == 0:
        return None
    vocab_size = fields.count("vocab_size_per_layer_input", 262_144)
    if vocab_size < fields.count("vocab_size"):
        raise fields.refuse("vocab_size_per_layer_input", "must not be below vocab_size: each token has some")
    return LayerInputs(fields.count(key, 256), vocab_size)


def check_uneven(heads: UnevenHeads | None, engine: EngineConfig, *, is_cuda: bool) -> None:
    """Refuse what is not built of layers whose heads differ. Raises ConfigError."""
    if heads is None:
        return
    if engine.kv_cache_dtype != "auto" and (is_cuda or engine.kv_cache_dtype == "int8"):
        raise ConfigError(
            f"kv_cache_dtype: {engine.kv_cache_dtype} is for layers whose heads are all of one size; use auto"
        )
