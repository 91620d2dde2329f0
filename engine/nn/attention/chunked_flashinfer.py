"""Attention on CUDA of a model of whose layers some attend in chunks: by FlashInfer, as layers that see all keys do, of
rows that are cut at the ends of chunks.

    FlashInferChunkedAttention    any batch: the host cuts the rows (`chunk_rows.py`)
    ChunkedGraphAttention         rows of one token: a graph works out their pages from the page index of whole rows

        a row's first page = its position's chunk, in pages        its pages = those from there on

Not run on a card: shown on an emulated device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ....models.parts.chunks import Chunk
from .base import AttentionMetadata
from .chunk_rows import by_chunk
from .flashinfer import FlashInferAttention
from .page_index import PageIndex


class Make(Protocol):
    """Makes attention over the model's pages."""

    def __call__(self, windows: Sequence[int | None], /, *, workspace: Tensor | None = None) -> FlashInferAttention: ...


class FlashInferChunkedAttention:
    """Implements `DeviceAttention`. Owned by the engine's thread."""

    name = "flashinfer"

    def __init__(self, windows: Sequence[int | None], block_size: int, make: Make) -> None:
        """`windows`: of each layer; all chunks are of one size, of whole blocks."""
        [self.chunk] = {int(window) for window in windows if isinstance(window, Chunk)}
        self.block_size = block_size
        self.are_chunked = [isinstance(window, Chunk) for window in windows]
        self.whole = make([None if isinstance(window, Chunk) else window for window in windows])
        self.chunked = make([None] * len(windows), workspace=self.whole.workspace)

    def plan(self, metadata: AttentionMetadata) -> None:
        self.plan_with(metadata, ())

    def plan_with(self, metadata: AttentionMetadata, more: Sequence[Tensor]) -> list[Tensor]:
        found = self.whole.plan_with(metadata, more)
        self.chunked.plan(by_chunk(metadata, self.chunk, self.block_size))
        return found

    def plan_nothing(self) -> None:
        self.whole.plan_nothing()
        self.chunked.plan_nothing()

    @property
    def positions(self) -> Tensor:
        return self.whole.positions

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int, out: Tensor | None = None) -> Tensor:
        attention = self.chunked if self.are_chunked[layer_id] else self.whole
        return attention.forward(q, k, v, layer_id, out)

    def empty_heads(self, num_tokens: int) -> Tensor:
        return self.whole.empty_heads(num_tokens)

    def empty_result(self, num_tokens: int) -> Tensor:
        return self.whole.empty_result(num_tokens)

    def split(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.whole.split(heads)

    def warm_up(self) -> None:
        """Leave all planned for the smallest step."""
        self.whole.warm_up()
        self.chunked.warm_up()

    def for_graph(self, index: PageIndex) -> ChunkedGraphAttention:
        return ChunkedGraphAttention(self, index)


class ChunkedGraphAttention:
    """Implements `GraphAttention`."""

    def __init__(self, attention: FlashInferChunkedAttention, index: PageIndex) -> None:
        self._attention = attention
        self._index = index
        num_rows, device = len(index.positions), index.positions.device
        num_pages = num_rows * (attention.chunk // attention.block_size)

        def zeros(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        self._own = PageIndex(
            row_of_token=index.row_of_token,
            positions=zeros(num_rows),
            paged_kv_indptr=zeros(num_rows + 1),
            paged_kv_indices=zeros(num_pages),
            paged_kv_last_page_len=zeros(num_rows),
        )
        self._places = torch.arange(num_pages, dtype=torch.int32, device=device)
        self._indptr = torch.zeros(num_rows + 1, dtype=torch.int32, pin_memory=True)
        self._whole = attention.whole.for_graph(index)
        self._chunked = attention.chunked.for_graph(self._own)
        self._first_layer = attention.are_chunked.index(True)

    def plan(self, indptr: Tensor, last_page_len: Tensor, num_pages: int) -> None:
        self._whole.plan(indptr, last_page_len, num_pages)
        block_size = self._attention.block_size
        positions = (indptr.diff() - 1) * block_size + last_page_len - 1
        counts = positions % self._attention.chunk // block_size + 1
        torch.cumsum(counts, 0, dtype=torch.int32, out=self._indptr[1:])
        self._chunked.plan(self._indptr, last_page_len, int(self._indptr[-1]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        if layer_id == self._first_layer:
            self._find_pages()
        attention = self._chunked if self._attention.are_chunked[layer_id] else self._whole
        return attention.forward(q, k, v, layer_id)

    def _find_pages(self) -> None:
        """Fill the rows' own index, whose `paged_kv_indptr` and `paged_kv_last_page_len` are there by their plan.

        Not when that is made: of a row that begins a page its id may come later (`engine/cuda/rows.py`).
        """
        index, own, chunk = self._index, self._own, self._attention.chunk
        torch.remainder(index.positions, chunk, out=own.positions)
        left_out = index.positions // chunk * (chunk // self._attention.block_size)
        begins = index.paged_kv_indptr[:-1] + left_out - own.paged_kv_indptr[:-1]
        rows = torch.searchsorted(own.paged_kv_indptr, self._places, right=True).sub_(1).clamp_(max=len(begins) - 1)
        sources = (begins[rows] + self._places).clamp_(max=len(index.paged_kv_indices) - 1)
        torch.index_select(index.paged_kv_indices, 0, sources, out=own.paged_kv_indices)
