"""Typed reads of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...common.errors import ConfigError

# Null says of these that there is none: no window, no cap, no size of heads of its own. Of others it says nothing.
_TOLD_BY_NULL = {"attn_logit_softcapping", "final_logit_softcapping", "head_dim", "sliding_window"}
# Beyond what any model has: a slip of a digit is told, and takes no memory. Each layer and each expert has entries of
# its own wherever a model is described.
_MOST = 2**31 - 1
_MOST_LAYERS, _MOST_EXPERTS = 1024, 4096
_MOST_OF = {
    "num_hidden_layers": _MOST_LAYERS,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _MOST_EXPERTS),
}
_MAX_CHARS = 200  # of a value that is told
_LARGEST = 2.0**53  # of numbers with a fraction


class ConfigFields:
    """Typed reads of config.json: an error names the file, the key and the value."""

    def __init__(self, path: Path, raw: Mapping[str, object]) -> None:
        self.path = path
        self.raw = raw

    def with_defaults(self, defaults: Mapping[str, object]) -> ConfigFields:
        """Add what is not told."""
        untold = {key for key in defaults if key not in _TOLD_BY_NULL and not self.has(key)}
        told = {key: value for key, value in self.raw.items() if key not in untold}
        return ConfigFields(self.path, {**defaults, **told})

    def has(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def told(self, keys: tuple[str, ...]) -> str:
        """Return the first of some names of one thing that is told; none is: the first."""
        return next(filter(self.has, keys), keys[0])

    def refuse(self, key: str, why: str) -> ConfigError:
        value = repr(self.raw.get(key))
        value = value if len(value) <= _MAX_CHARS else f"{value[:_MAX_CHARS]}..."
        return ConfigError(f"{self.path}: {key} = {value}: {why}")

    def count(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, float) and value.is_integer():  # tools that work in floats write 32768.0
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(key, "must be a whole number of at least 1")
        if value > (most := _MOST_OF.get(key, _MOST)):
            raise self.refuse(key, f"must be at most {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.refuse(key, "must be a number above 0")
        if value > _LARGEST:
            raise self.refuse(key, f"must be at most {_LARGEST:g}")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        value = self.raw.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise ConfigError(f"{self.path}: {key} must be a list of {count} numbers above 0")
        return tuple(ConfigFields(self.path, {key: item}).number(key) for item in value)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, "must be true or false")
        return value

    def mapping(self, key: str) -> ConfigFields | None:
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refuse(key, "must be an object")
        return ConfigFields(self.path, value)


def read_end_ids(fields: ConfigFields, generation: Mapping[str, object]) -> frozenset[int]:
    """Return the tokens that end an answer. Raises ConfigError.

    generation_config.json wins: chat models end their turn with tokens that config.json does not name.
    """
    value = (fields.raw if generation.get("eos_token_id") is None else generation).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"{fields.path.parent}: eos_token_id = {value!r} must be token ids")
    return frozenset(ids)


def count_draft_layers(fields: ConfigFields) -> int:
    """Count the layers that predict further tokens. Raises ConfigError."""
    key = fields.told(("num_nextn_predict_layers", "num_mtp_modules"))
    return fields.count(key) if fields.raw.get(key) else 0
