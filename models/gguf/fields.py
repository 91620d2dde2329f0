"""Typed reads of a GGUF file's key-value fields."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from gguf import GGUFReader

log = structlog.get_logger(__name__)

_SPECIAL = ("bos", "eos", "eot", "eom", "unknown", "padding")  # tokens, by GGUF's names
_NO_TOKEN = 0xFFFFFFFF  # llama.cpp's id of none, which files have, too


class GgufFields:
    """Reads of the fields of one file: an error, always a ValueError or a KeyError, names the key and the value."""

    def __init__(self, reader: GGUFReader) -> None:
        self._reader = reader

    @property
    def architecture(self) -> str:
        return self.text("general.architecture")

    def of_model(self, name: str) -> str:
        """Return the key of a field that belongs to the file's architecture."""
        return f"{self.architecture}.{name}"

    def find(self, key: str) -> object:
        """Return a field's value; None where there is no such field."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    @cached_property
    def special(self) -> Mapping[str, int]:
        """The ids of special tokens, by GGUF's names. One outside the vocabulary names none, as in llama.cpp."""
        found: dict[str, int] = {}
        for name in _SPECIAL:
            key = f"tokenizer.ggml.{name}_token_id"
            if self.find(key) is None:
                continue
            token = self.integer(key)
            if 0 <= token < self._num_tokens:
                found[name] = token
            elif token not in (-1, _NO_TOKEN):
                log.warning("gguf_token_ignored", field=key, token=token, num_tokens=self._num_tokens)
        return found

    @cached_property
    def _num_tokens(self) -> int:
        return len(self.texts("tokenizer.ggml.tokens"))

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"field {key} is {value!r}, not an integer")
        return value

    def count(self, name: str) -> int:
        """Read a field of the file's architecture that is at least 1."""
        if (value := self.integer(self.of_model(name))) < 1:
            raise ValueError(f"{self.of_model(name)} = {value} is less than 1")
        return value

    def of_layers(self, name: str, num_layers: int, default: int) -> list[int]:
        """Read a field of the file's architecture that is one number for all layers, or a list of one for each.

        Of a list longer than the model the beginning is returned: of layers behind it.
        """
        key = self.of_model(name)
        value = self.find(key)
        if not isinstance(value, list):
            return [self.integer(key, default)] * num_layers
        if len(value) < num_layers or not all(type(each) is int for each in value):
            raise ValueError(f"field {key} is {value!r}, not a whole number for each of {num_layers} layers")
        return value[:num_layers]

    def number(self, key: str, default: float | None = None) -> float:
        """Read a float32 field as the decimal that was meant, the shortest: 9.99999974e-06 is 1e-05."""
        import numpy as np

        value = self._get(key, default)
        if not isinstance(value, float):
            raise ValueError(f"field {key} is {value!r}, not a number")
        with np.errstate(over="ignore"):
            single = np.float32(value)
        return float(str(single)) if float(single) == value else value  # a float64 stays as it is

    def text(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str):
            raise ValueError(f"field {key} is {value!r}, not a string")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"field {key} is {value!r}, not true or false")
        return value

    def texts(self, key: str) -> list[str]:
        return [str(item) for item in self._list(key)]

    def integers(self, key: str) -> list[int]:
        return [int(item) for item in self._list(key)]

    def numbers(self, key: str) -> list[float]:
        return [float(item) for item in self._list(key)]

    def _get(self, key: str, default: object = None) -> object:
        value = self.find(key)
        if value is None and default is None:
            raise KeyError(f"no field {key}")
        return default if value is None else value

    def _list(self, key: str) -> list[int | float | str]:
        value = self._get(key)
        if not isinstance(value, list):
            raise ValueError(f"field {key} is {value!r}, not a list")
        return value
