"""The kind of layers with states that a family has is chosen here."""

from __future__ import annotations

from ..families.family import Family
from .config_fields import ConfigFields
from .delta_nets import read_delta_nets
from .mamba import read_mamba
from .short_convolutions import read_short_convolutions
from .states import StatesConfig


def read_states(fields: ConfigFields, family: Family, num_kv_heads: int) -> StatesConfig | None:
    """Return the states of a model that has some; None: every layer keeps keys and values. Raises ConfigError."""
    states = _read_kind(fields, family)
    return None if states is None else states.shared_by(num_kv_heads)


def _read_kind(fields: ConfigFields, family: Family) -> StatesConfig | None:
    match family.states:
        case None:
            return None
        case "delta nets" | "grouped delta nets" as kind:
            return read_delta_nets(fields, is_grouped=kind == "grouped delta nets")
        case "short convolutions":
            return read_short_convolutions(fields)
        case "mamba":
            return read_mamba(fields, family)
