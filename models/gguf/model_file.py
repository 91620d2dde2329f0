"""A GGUF file as far as it is known when the fields of its own family are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .fields import GgufFields

Json = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]  # of all tensors of the file, by their names there


@dataclass(slots=True, frozen=True)
class ModelFile:
    """A GGUF file's fields and tensors, and what config.json has of it already."""

    fields: GgufFields
    config: Json
    shapes: Shapes
    factors: Mapping[str, list[float]]  # by what rotary frequencies are divided, by their tensor's name

    def has(self, end: str) -> bool:
        """Tell whether a layer has a tensor of this name."""
        return any(name.endswith(f".{end}") for name in self.shapes)

    def of_layer(self, layer: int, name: str) -> bool:
        return any(f"blk.{layer}.{name}{end}" in self.shapes for end in ("", ".weight", ".bias"))

    def integer(self, name: str, default: int | None = None) -> int:
        """Read a field of the file's architecture."""
        return self.fields.integer(self.fields.of_model(name), default)

    def number(self, name: str, default: float | None = None) -> float:
        """Read a field of the file's architecture."""
        return self.fields.number(self.fields.of_model(name), default)
