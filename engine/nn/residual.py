"""Some families do more to the residual stream of a layer than to add its blocks' results."""

from __future__ import annotations

from collections.abc import Iterator

from ..weights.weight import WeightSlot
from .builder import Builder


class LayerFactor:
    """A number multiplies the residual stream behind a layer."""

    def __init__(self, builder: Builder, name: str) -> None:
        self.name = name
        self.weight = builder.empty(1)

    def slots(self) -> Iterator[WeightSlot]:
        yield WeightSlot(self.name, (1,), self.weight)
