"""Gated convolutions over the last few tokens, as config.json tells them (Liquid AI 2025, "LFM2 Technical Report").

A token's row is as wide as the residual stream, and there is no memory: the rows of the last tokens are the state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from ..families.family import Family
from .config_fields import ConfigFields
from .states import RowPart, Shape, StatesConfig, stateful_layers


@dataclass(slots=True, frozen=True, kw_only=True)
class ShortConvolutionsConfig(StatesConfig):
    """The layers that are such convolutions."""

    num_columns: int  # of the residual stream
    has_bias: bool  # each of the two products, and the convolution

    @property
    def module(self) -> str:
        return "conv"

    @property
    def row_parts(self) -> tuple[RowPart, ...]:
        return (RowPart(self.num_columns),)

    @property
    def num_divided(self) -> int:
        return self.num_columns

    def _divided(self, parts: int) -> Self:
        return replace(self, num_columns=self.num_columns // parts)

    @property
    def memory_shape(self) -> Shape:
        return (0,)

    @property
    def num_values(self) -> int:
        return self.num_columns

    @property
    def num_of_heads(self) -> int:
        return 0

    def shapes(self, name: str, hidden_size: int) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {
            f"{name}.conv.weight": (self.num_columns, 1, self.kernel_size),
            f"{name}.in_proj.weight": (3 * self.num_columns, hidden_size),
            f"{name}.out_proj.weight": (hidden_size, self.num_columns),
        }
        biases = {f"{weight.removesuffix('weight')}bias": (shape[0],) for weight, shape in shapes.items()}
        return shapes | biases if self.has_bias else shapes


def read_short_convolutions(fields: ConfigFields) -> ShortConvolutionsConfig:
    """Raises ConfigError."""
    key = fields.told(("layer_types", "full_attn_idxs"))
    types = fields.raw.get(key)
    if key == "full_attn_idxs":
        others = types if isinstance(types, list) else []
        count = fields.count("num_hidden_layers")
        if not others or not all(layer in range(count) for layer in others):
            raise fields.refuse(key, f"must list the layers that attend, of {count}")
        types = ["full_attention" if layer in others else "conv" for layer in range(count)]
    return ShortConvolutionsConfig(
        layers=stateful_layers(fields, key, types, {"conv"}),
        kernel_size=fields.count("conv_L_cache"),
        num_columns=fields.count("hidden_size"),
        has_bias=fields.flag("conv_bias", default=False),
    )


def inner_size(fields: ConfigFields, family: Family) -> int:
    """Return the inner columns of a dense layer's gated MLP. Raises ConfigError.

    LFM2's config.json tells those of an MLP without a gate, of as many weights.
    """
    if not family.mlp.is_adjusted:
        return fields.count(family.mlp.size)
    size = fields.count(key := fields.told(("block_ff_dim", family.mlp.size)))
    if not fields.flag("block_auto_adjust_ff_dim", default=True):
        return size
    size = 2 * size // 3
    if fields.has("block_ffn_dim_multiplier"):
        step = fields.count("block_multiple_of")
        size = -(-int(fields.number("block_ffn_dim_multiplier") * size) // step) * step
    if size < 1:
        raise fields.refuse(key, "a gated MLP has no column of it, once block_ffn_dim_multiplier is applied")
    return size
