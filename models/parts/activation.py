"""The activation of feed-forwards, as config.json tells it."""

from __future__ import annotations

from typing import Literal

from ..families.family import Family
from .config_fields import ConfigFields

Activation = Literal["silu", "gelu_tanh", "relu2"]

_GATED: dict[object, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_PLAIN: dict[object, Activation] = _GATED | {"relu2": "relu2"}


def read_activation(fields: ConfigFields, family: Family) -> Activation:
    """Raises ConfigError for one that feed-forwards of the family have not."""
    key = family.activation_key
    value = fields.raw.get(key, "silu")
    known = _PLAIN if family.mlp.gate is None else _GATED
    if not isinstance(value, str) or value not in known:
        raise fields.refuse(key, f"only {' and '.join(map(str, known))} are supported")
    return known[value]
