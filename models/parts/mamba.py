"""Mamba's second kind of layers, as config.json tells them (Dao, Gu 2024, "Transformers are SSMs", section 7).

memory   of each head a matrix [state_dim, head_dim]: decayed, and added to, by every token
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Literal, Self

from ..families.family import Family
from .config_fields import ConfigFields
from .lone_blocks import FEED_FORWARDS
from .states import RowPart, Shape, StatesConfig, stateful_layers

# Where a norm of what heads yield stands: behind its product with the gates, before it, or nowhere.
GatedNorm = Literal["behind gates", "before gates", "none"]

# JSON has none, so libraries write it in several ways.
_INFINITIES: tuple[object, ...] = ("inf", {"__float__": "Infinity"})


@dataclass(slots=True, frozen=True, kw_only=True)
class MambaConfig(StatesConfig):
    """The layers of this kind."""

    module: str
    num_heads: int
    head_dim: int
    num_groups: int  # of heads that are read and written alike
    state_dim: int
    conv_bias: bool
    proj_bias: bool  # of both products
    norm: GatedNorm = "behind gates"
    step_limits: tuple[float, float] = (0.0, math.inf)  # of a token's step, the least and the most

    @property
    def num_values(self) -> int:
        """Count the numbers of a token's values; its gates are as many."""
        return self.num_heads * self.head_dim

    @property
    def num_keys(self) -> int:
        """Count the numbers of what a token writes by; of what it reads by there are as many."""
        return self.num_groups * self.state_dim

    @property
    def has_one_group(self) -> bool:
        """Tell whether all heads are read and written alike."""
        return self.num_groups == 1

    @property
    def is_normed_whole(self) -> bool:
        """Tell whether what all heads yield is normed together."""
        return self.has_one_group and self.norm != "none"

    @property
    def row_parts(self) -> tuple[RowPart, ...]:
        """List a token's values, and what it writes and reads by: one group's is that of all heads."""
        keys = RowPart(self.num_keys, is_common=self.has_one_group)
        return RowPart(self.num_values), keys, keys

    @property
    def num_divided(self) -> int:
        return self.num_heads if self.has_one_group else self.num_groups

    def _divided(self, parts: int) -> Self:
        num_groups = 1 if self.has_one_group else self.num_groups // parts
        return replace(self, num_heads=self.num_heads // parts, num_groups=num_groups)

    @property
    def memory_shape(self) -> Shape:
        return self.num_heads, self.state_dim, self.head_dim

    @property
    def num_of_heads(self) -> int:
        return self.num_values + 2 * self.num_heads * self.state_dim

    def shapes(self, name: str, hidden_size: int) -> dict[str, Shape]:
        projected = self.num_values + self.num_convolved + self.num_heads
        shapes: dict[str, Shape] = {
            f"{name}.in_proj.weight": (projected, hidden_size),
            f"{name}.conv1d.weight": (self.num_convolved, 1, self.kernel_size),
            f"{name}.A_log": (self.num_heads,),
            f"{name}.D": (self.num_heads,),
            f"{name}.dt_bias": (self.num_heads,),
            f"{name}.out_proj.weight": (hidden_size, self.num_values),
        }
        if self.norm != "none":
            shapes[f"{name}.norm.weight"] = (self.num_values,)
        if self.conv_bias:
            shapes[f"{name}.conv1d.bias"] = (self.num_convolved,)
        if self.proj_bias:
            shapes |= {f"{name}.in_proj.bias": (projected,), f"{name}.out_proj.bias": (hidden_size,)}
        return shapes


def read_mamba(fields: ConfigFields, family: Family) -> MambaConfig | None:
    """Return the layers of this kind, if there are any. Raises ConfigError."""
    key = fields.told(("layer_types", "layers_block_type"))
    others = FEED_FORWARDS if family.has_lone_blocks else frozenset[str]()
    if family.attends_beside_states:
        layers: tuple[bool, ...] = (True,) * fields.count("num_hidden_layers")
    else:
        layers = stateful_layers(fields, key, fields.raw.get(key), {"mamba", "linear_attention"}, others)
    if not any(layers):
        return None
    num_heads, num_groups = fields.count("mamba_n_heads"), fields.count("mamba_n_groups", 1)
    size = fields.count("mamba_d_ssm", int(fields.number("mamba_expand", 2) * fields.count("hidden_size")))
    told = None if fields.raw.get("mamba_d_head") == "auto" else fields.raw.get("mamba_d_head")
    head_dim = size // num_heads if told is None else fields.count("mamba_d_head")
    if num_heads * head_dim != size:
        raise fields.refuse("mamba_d_head", f"{num_heads} heads of {head_dim} numbers are not the {size} of a token")
    if num_heads % num_groups:
        raise fields.refuse("mamba_n_groups", f"must divide mamba_n_heads = {num_heads}")
    limits = _step_limits(fields)
    # There transformers takes the least step from time_step_min, but in prompts alone: a token that is generated has
    # none, and would leave another state once it stands in a prompt. None is kept: a prefix has one state.
    if family.has_lone_blocks and limits != (0.0, math.inf):
        raise fields.refuse("time_step_limit", "bounds of time steps are not supported in this architecture")
    return MambaConfig(
        module=family.attention if family.has_lone_blocks else "mamba",
        layers=layers,
        kernel_size=fields.count("mamba_d_conv", 4),
        num_heads=num_heads,
        head_dim=head_dim,
        num_groups=num_groups,
        state_dim=fields.count("mamba_d_state"),
        conv_bias=fields.flag("mamba_conv_bias", default=True),
        proj_bias=fields.flag("mamba_proj_bias", default=False),
        norm=_norm(fields) if family.attends_beside_states else "behind gates",
        are_beside_keys=family.attends_beside_states,
        step_limits=limits,
    )


def _norm(fields: ConfigFields) -> GatedNorm:
    if not fields.flag("mamba_rms_norm", default=False):
        return "none"
    return "before gates" if fields.flag("mamba_norm_before_gate", default=True) else "behind gates"


def _step_limits(fields: ConfigFields) -> tuple[float, float]:
    if not fields.has("time_step_limit"):
        return 0.0, math.inf
    told = fields.raw["time_step_limit"]
    numbers = [math.inf if each in _INFINITIES else each for each in told] if isinstance(told, list) else []
    match numbers:
        case [int() | float() as least, int() | float() as most] if 0 <= least <= most and least < math.inf:
            if most > sys.float_info.max and most != math.inf:  # JSON's whole numbers may be
                raise fields.refuse("time_step_limit", f"must be at most {sys.float_info.max:g}, or infinity")
            return float(least), float(most)
    raise fields.refuse("time_step_limit", "must be two numbers from 0 on, the smaller first")
