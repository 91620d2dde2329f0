"""Attention on CUDA of a model whose layers are of several kinds: each kind has FlashInfer's attention of its own.

They run one after another on one stream, so they share scratch memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from .base import AttentionMetadata, LayerPages
from .device import GraphAttention
from .flashinfer import FlashInferAttention
from .page_index import PageIndex, upload_step


class Make(Protocol):
    """Makes attention of some layers' pages, and of their windows."""

    def __call__(
        self, own: LayerPages, windows: Sequence[int | None], workspace: Tensor | None = None
    ) -> FlashInferAttention: ...


class Place(NamedTuple):
    """A layer is computed here."""

    part: int
    layer: int  # of that part


class FlashInferParts:
    """Implements `DeviceAttention`. Owned by the engine's thread."""

    name = "flashinfer"
    keeps_values = True
    value_dim: int | None = None

    def __init__(self, parts: Sequence[FlashInferAttention], places: Sequence[Place]) -> None:
        """`places`: of each layer."""
        self.parts, self.places = parts, places
        self.dtype = parts[0].dtype
        self.heads_size = max(part.heads_size for part in parts)
        self.result_size = max(part.result_size for part in parts)

    def plan(self, metadata: AttentionMetadata) -> None:
        self.plan_with(metadata, ())

    def plan_with(self, metadata: AttentionMetadata, more: Sequence[Tensor]) -> list[Tensor]:
        step = upload_step(metadata, self.parts[0].device, more)
        for part in self.parts:
            part.plan_step(metadata, step)
        return step.more

    def plan_nothing(self) -> None:
        for part in self.parts:
            part.plan_nothing()

    @property
    def positions(self) -> Tensor:
        return self.parts[0].positions

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int, out: Tensor | None = None) -> Tensor:
        place = self.places[layer_id]
        return self.parts[place.part].forward(q, k, v, place.layer, out)

    def warm_up(self) -> None:
        """Leave all planned for the smallest step."""
        for part in self.parts:
            part.warm_up()

    def for_graph(self, index: PageIndex) -> GraphAttention:
        return GraphParts([part.for_graph(index) for part in self.parts], self.places)


class GraphParts:
    """Implements `GraphAttention`."""

    def __init__(self, parts: Sequence[GraphAttention], places: Sequence[Place]) -> None:
        self.parts, self.places = parts, places

    def plan(self, indptr: Tensor, last_page_len: Tensor, num_pages: int) -> None:
        for part in self.parts:
            part.plan(indptr, last_page_len, num_pages)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        place = self.places[layer_id]
        return self.parts[place.part].forward(q, k, v, place.layer)
