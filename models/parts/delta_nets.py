"""Gated delta nets, as config.json tells them (Yang et al. 2024, "Gated Delta Networks", section 3).

memory   of each value head a matrix [key_dim, value_dim]: decayed and corrected by every token
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from .config_fields import ConfigFields
from .states import RowPart, Shape, StatesConfig, stateful_layers


@dataclass(slots=True, frozen=True, kw_only=True)
class DeltaNetsConfig(StatesConfig):
    """The layers that are gated delta nets."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int  # of a head's key and query
    value_dim: int
    is_grouped: bool  # the checkpoint has each key head's parts side by side in one tensor

    @property
    def module(self) -> str:
        return "linear_attn"

    @property
    def num_keys(self) -> int:
        """Count the numbers of a token's keys; its queries are as many."""
        return self.num_key_heads * self.key_dim

    @property
    def num_values(self) -> int:
        """Count the numbers of a token's values; its gates are as many."""
        return self.num_value_heads * self.value_dim

    @property
    def row_parts(self) -> tuple[RowPart, ...]:
        """List a token's queries, keys and values."""
        return RowPart(self.num_keys), RowPart(self.num_keys), RowPart(self.num_values)

    @property
    def num_divided(self) -> int:
        return self.num_key_heads

    def _divided(self, parts: int) -> Self:
        heads = self.num_key_heads // parts, self.num_value_heads // parts
        return replace(self, num_key_heads=heads[0], num_value_heads=heads[1])

    @property
    def memory_shape(self) -> Shape:
        return self.num_value_heads, self.key_dim, self.value_dim

    @property
    def num_of_heads(self) -> int:
        return self.num_values + 2 * self.num_value_heads * self.key_dim

    @property
    def row_matrices(self) -> dict[str, int]:
        """Return the matrices of a token's row and gates, with their outputs."""
        convolved, gates = self.num_convolved, self.num_values
        return (
            {"in_proj_qkvz": convolved + gates} if self.is_grouped else {"in_proj_qkv": convolved, "in_proj_z": gates}
        )

    @property
    def rate_matrices(self) -> dict[str, int]:
        """Return the matrices of a token's strengths and decays, with their outputs."""
        heads = self.num_value_heads
        return {"in_proj_ba": 2 * heads} if self.is_grouped else {"in_proj_b": heads, "in_proj_a": heads}

    def shapes(self, name: str, hidden_size: int) -> dict[str, Shape]:
        sizes = self.row_matrices | self.rate_matrices
        shapes: dict[str, Shape] = {f"{name}.{part}.weight": (size, hidden_size) for part, size in sizes.items()}
        return shapes | {
            f"{name}.conv1d.weight": (self.num_convolved, 1, self.kernel_size),
            f"{name}.A_log": (self.num_value_heads,),
            f"{name}.dt_bias": (self.num_value_heads,),
            f"{name}.norm.weight": (self.value_dim,),
            f"{name}.out_proj.weight": (hidden_size, self.num_values),
        }


def read_delta_nets(fields: ConfigFields, *, is_grouped: bool) -> DeltaNetsConfig:
    """Raises ConfigError."""
    num_key_heads, num_value_heads = (fields.count(f"linear_num_{part}_heads") for part in ("key", "value"))
    if num_value_heads % num_key_heads:
        raise fields.refuse("linear_num_value_heads", f"must be a multiple of linear_num_key_heads = {num_key_heads}")
    return DeltaNetsConfig(
        layers=_layers(fields),
        num_key_heads=num_key_heads,
        num_value_heads=num_value_heads,
        key_dim=fields.count("linear_key_head_dim"),
        value_dim=fields.count("linear_value_head_dim"),
        kernel_size=fields.count("linear_conv_kernel_dim"),
        is_grouped=is_grouped,
    )


def _layers(fields: ConfigFields) -> tuple[bool, ...]:
    types = fields.raw.get("layer_types")
    if types is None:
        step = fields.count("full_attention_interval")
        types = [
            "linear_attention" if (layer + 1) % step else "full_attention"
            for layer in range(fields.count("num_hidden_layers"))
        ]
    return stateful_layers(fields, "layer_types", types, {"linear_attention"})
