"""Attention on CUDA of a model whose layers are of several kinds: each kind has FlashInfer's attention of its own.

    heads of one size, all of a row  ─┐
    heads of one size, a window      ─┼─ a part each: its layers' pages, and rows as these see them (`cut_rows.py`)
    heads of another size            ─┘

They run one after another on one stream, so they share scratch memory. Not run on a card: shown on an emulated device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ....models.parts.chunks import Chunk
from .base import AttentionMetadata, LayerPages
from .cut_flashinfer import CutGraphAttention
from .cut_rows import Cut, cut_of
from .device import GraphAttention
from .flashinfer import FlashInferAttention
from .page_index import PageIndex, upload_step
from .uneven import by_shape


class Make(Protocol):
    """Makes attention of some layers' pages: of those with these numbers, and of one window."""

    def __call__(
        self, own: LayerPages, layers: Sequence[int], window: int | None, workspace: Tensor | None = None
    ) -> FlashInferAttention: ...


class Part(NamedTuple):
    """The attention of layers of one kind. `cut`: None: they see whole rows."""

    attention: FlashInferAttention
    cut: Cut | None


class Place(NamedTuple):
    """A layer is computed here."""

    part: int
    layer: int  # of that part


def attention_in_parts(pages: LayerPages, windows: Sequence[int | None], make: Make) -> FlashInferParts:
    """Make attention of layers of several windows, or that keep pages of several sizes. All chunks are whole blocks."""
    groups = [list(range(len(windows)))] if isinstance(pages, Tensor) else by_shape(pages)
    parts, places = list[Part](), dict[int, Place]()
    for layers in groups:
        own: LayerPages = pages if isinstance(pages, Tensor) else [pages[layer] for layer in layers]
        for window in dict.fromkeys(windows[layer] for layer in layers):
            places |= {layer: Place(len(parts), n) for n, layer in enumerate(layers) if windows[layer] == window}
            hidden = None if isinstance(window, Chunk) else window
            attention = make(own, layers, hidden, parts[0].attention.workspace if parts else None)
            parts.append(Part(attention, cut_of(window, attention.block_size)))
    return FlashInferParts(parts, [places[layer] for layer in range(len(windows))])


class FlashInferParts:
    """Implements `DeviceAttention`. Owned by the engine's thread."""

    keeps_values = True
    value_dim: int | None = None

    def __init__(self, parts: Sequence[Part], places: Sequence[Place]) -> None:
        """`places`: of each layer."""
        self.parts, self.places = parts, places
        attentions = [part.attention for part in parts]
        self.dtype, self._device = attentions[0].dtype, attentions[0].device
        self.heads_size = max(attention.heads_size for attention in attentions)
        self.result_size = max(attention.result_size for attention in attentions)
        self._index: PageIndex | None = None  # of whole rows

    def plan(self, metadata: AttentionMetadata) -> None:
        self.plan_with(metadata, ())

    def plan_with(self, metadata: AttentionMetadata, more: Sequence[Tensor]) -> list[Tensor]:
        step = upload_step(metadata, self._device, more)
        self._index = step.index
        for attention, cut in self.parts:
            if cut is None:
                attention.plan_step(metadata, step)
            else:
                attention.plan(cut.rows(metadata))
        return step.more

    def plan_nothing(self) -> None:
        self._index = PageIndex.of_nothing(self._device)
        for attention, _ in self.parts:
            attention.plan_nothing()

    @property
    def positions(self) -> Tensor:
        assert self._index is not None, "nothing is planned"
        return self._index.positions

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int, out: Tensor | None = None) -> Tensor:
        place = self.places[layer_id]
        return self.parts[place.part].attention.forward(q, k, v, place.layer, out)

    def warm_up(self) -> None:
        """Leave all planned for the smallest step."""
        for attention, _ in self.parts:
            attention.warm_up()

    def for_graph(self, index: PageIndex) -> GraphAttention:
        graphs = [self._for_graph(number, index) for number in range(len(self.parts))]
        is_unfilled = all(cut is not None for _, cut in self.parts)  # where no part sees whole rows, which fills it
        return GraphParts(graphs, self.places, index.paged_kv_indptr if is_unfilled else None)

    def _for_graph(self, number: int, index: PageIndex) -> GraphAttention:
        attention, cut = self.parts[number]
        if cut is None:
            return attention.for_graph(index)
        first_layer = next(place.layer for place in self.places if place.part == number)
        return CutGraphAttention(attention, cut, index, first_layer)


class GraphParts:
    """Implements `GraphAttention`."""

    def __init__(self, parts: Sequence[GraphAttention], places: Sequence[Place], unfilled: Tensor | None) -> None:
        """`unfilled`: the indptr of whole rows, where no part's plan fills it."""
        self._parts, self._places, self._unfilled = parts, places, unfilled

    def plan(self, indptr: Tensor, last_page_len: Tensor, num_pages: int) -> None:
        if self._unfilled is not None:
            self._unfilled.copy_(indptr, non_blocking=True)
        for part in self._parts:
            part.plan(indptr, last_page_len, num_pages)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        place = self._places[layer_id]
        return self._parts[place.part].forward(q, k, v, place.layer)
