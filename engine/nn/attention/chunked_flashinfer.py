"""Attention on CUDA of a model of whose layers some attend in chunks: by FlashInfer, as layers that see all keys do, of
rows that are cut at the ends of chunks.

    FlashInferChunkedAttention    any batch: the host cuts the rows (`chunk_rows.py`)
    ChunkedGraphAttention         rows of one token: a graph works out their pages from the page index of whole rows

        a row's first page = its position's chunk, in pages        its pages = those from there on

Not run on a card: shown on an emulated device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....models.parts.chunks import Chunk
from .base import AttentionMetadata
from .chunk_rows import by_chunk
from .flashinfer_parts import FlashInferParts, GraphParts, Make, Place
from .page_index import PageIndex


class FlashInferChunkedAttention(FlashInferParts):
    """Layers that see whole rows come first, then those that attend in chunks."""

    def __init__(self, windows: Sequence[int | None], pages: Tensor, make: Make) -> None:
        """`windows`: of each layer; all chunks are of one size, of whole blocks."""
        [self.chunk] = {int(window) for window in windows if isinstance(window, Chunk)}
        self.block_size = pages.shape[4]
        whole = make(pages, [None if isinstance(window, Chunk) else window for window in windows])
        chunked = make(pages, [None] * len(windows), whole.workspace)
        places = [Place(int(isinstance(window, Chunk)), layer) for layer, window in enumerate(windows)]
        super().__init__((whole, chunked), places)

    def plan_with(self, metadata: AttentionMetadata, more: Sequence[Tensor]) -> list[Tensor]:
        whole, chunked = self.parts
        chunked.plan(by_chunk(metadata, self.chunk, self.block_size))
        return whole.plan_with(metadata, more)

    def for_graph(self, index: PageIndex) -> ChunkedGraphAttention:
        return ChunkedGraphAttention(self, index)


class ChunkedGraphAttention(GraphParts):
    """Layers as those of `FlashInferChunkedAttention`."""

    def __init__(self, attention: FlashInferChunkedAttention, index: PageIndex) -> None:
        self._chunk, self._block_size = attention.chunk, attention.block_size
        self._index = index
        num_rows, device = len(index.positions), index.positions.device
        num_pages = num_rows * (self._chunk // self._block_size)

        def zeros(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        self._own = PageIndex(
            row_of_token=index.row_of_token,
            positions=zeros(num_rows),
            paged_kv_indptr=zeros(num_rows + 1),
            paged_kv_indices=zeros(num_pages),
            paged_kv_last_page_len=zeros(num_rows),
        )
        self._slots = torch.arange(num_pages, dtype=torch.int32, device=device)
        self._indptr = torch.zeros(num_rows + 1, dtype=torch.int32, pin_memory=True)
        whole, chunked = attention.parts
        super().__init__((whole.for_graph(index), chunked.for_graph(self._own)), attention.places)
        self._first_layer = [place.part for place in self.places].index(1)

    def plan(self, indptr: Tensor, last_page_len: Tensor, num_pages: int) -> None:
        whole, chunked = self.parts
        whole.plan(indptr, last_page_len, num_pages)
        positions = (indptr.diff() - 1) * self._block_size + last_page_len - 1
        counts = positions % self._chunk // self._block_size + 1
        torch.cumsum(counts, 0, dtype=torch.int32, out=self._indptr[1:])
        chunked.plan(self._indptr, last_page_len, int(self._indptr[-1]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        if layer_id == self._first_layer:
            self._find_pages()
        return super().forward(q, k, v, layer_id)

    def _find_pages(self) -> None:
        """Fill the rows' own index, whose `paged_kv_indptr` and `paged_kv_last_page_len` are there by their plan.

        Not when that is made: of a row that begins a page its id may come later (`engine/cuda/rows.py`).
        """
        index, own = self._index, self._own
        torch.remainder(index.positions, self._chunk, out=own.positions)
        left_out = index.positions // self._chunk * (self._chunk // self._block_size)
        begins = index.paged_kv_indptr[:-1] + left_out - own.paged_kv_indptr[:-1]
        rows = torch.searchsorted(own.paged_kv_indptr, self._slots, right=True).sub_(1).clamp_(max=len(begins) - 1)
        sources = (begins[rows] + self._slots).clamp_(max=len(index.paged_kv_indices) - 1)
        torch.index_select(index.paged_kv_indices, 0, sources, out=own.paged_kv_indices)
