"""A graph's attention on CUDA over cut rows (`cut_rows.py`): the graph works out their pages from those of whole rows.

    a row's first page = the first that its token reads, its pages = those from there on

Not run on a card: shown on an emulated device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cut_rows import Cut
from .device import GraphAttention
from .flashinfer import FlashInferAttention
from .page_index import PageIndex


class CutGraphAttention:
    """Implements `GraphAttention` for the layers of one window."""

    def __init__(self, attention: FlashInferAttention, cut: Cut, index: PageIndex, first_layer: int) -> None:
        """`index`: of whole rows. `first_layer`: the first of the layers that `forward` is called for."""
        self._cut, self._index, self._first_layer = cut, index, first_layer
        self._block_size = attention.block_size
        num_rows, device = len(index.positions), index.positions.device
        num_pages = num_rows * cut.max_pages

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
        self._attention: GraphAttention = attention.for_graph(self._own)

    def plan(self, indptr: Tensor, last_page_len: Tensor, num_pages: int) -> None:
        positions = (indptr.diff() - 1) * self._block_size + last_page_len - 1
        counts = positions // self._block_size + 1 - self._cut.first_page(positions)
        torch.cumsum(counts, 0, dtype=torch.int32, out=self._indptr[1:])
        self._attention.plan(self._indptr, last_page_len, int(self._indptr[-1]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        if layer_id == self._first_layer:
            self._find_pages()
        return self._attention.forward(q, k, v, layer_id)

    def _find_pages(self) -> None:
        """Fill the rows' own index, whose `paged_kv_indptr` and `paged_kv_last_page_len` are there by their plan.

        Not when that is made: of a row that begins a page its id may come later (`engine/cuda/rows.py`).
        """
        index, own = self._index, self._own
        first = self._cut.first_page(index.positions)
        torch.sub(index.positions, first * self._block_size, out=own.positions)
        begins = index.paged_kv_indptr[:-1] + first - own.paged_kv_indptr[:-1]
        rows = torch.searchsorted(own.paged_kv_indptr, self._slots, right=True).sub_(1).clamp_(max=len(begins) - 1)
        sources = (begins[rows] + self._slots).clamp_(max=len(index.paged_kv_indices) - 1)
        torch.index_select(index.paged_kv_indices, 0, sources, out=own.paged_kv_indices)
