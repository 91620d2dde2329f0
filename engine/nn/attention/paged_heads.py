"""The base of attention on a CPU: a rank's heads, and the pages that a step's keys and values are written to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import AttentionMetadata, LayerPages, Scores, heads_of_pages, row_steps
from .int8_rows import stored_head_dim, write_rows


class PagedHeads:
    """The base of an `AttentionBackend` that reads pages by torch's operations. Owned by the engine's thread."""

    def __init__(
        self,
        pages: LayerPages,
        num_qo_heads: int,
        sliding_windows: Sequence[int | None],
        scores: Scores,
        dtype: torch.dtype | None,
    ) -> None:
        """`dtype`: what keys and values are gathered in, where pages are in another type."""
        self._layers = [pages[layer] for layer in range(len(pages))]
        first = self._layers[0]
        _, _, self._num_kv_heads, self._block_size, _ = first.shape
        assert num_qo_heads % self._num_kv_heads == 0, (num_qo_heads, self._num_kv_heads)
        self._head_dim = stored_head_dim(first)
        self._group_size = num_qo_heads // self._num_kv_heads
        self._scores = scores
        self._scale = scores.scale_of(self._head_dim)
        self._has_values = scores.value_dim is None  # else they are a part of the keys
        self._value_dim = scores.value_dim or self._head_dim
        self._windows = tuple(sliding_windows)
        self._dtype = dtype or first.dtype
        self._page_rows = [heads_of_pages(layer) for layer in self._layers]
        self._steps = row_steps(first)
        self._blocks = self._offsets = torch.empty(0, dtype=torch.int64)  # of each token of the step

    def plan(self, metadata: AttentionMetadata) -> None:
        self._blocks = metadata.slot_mapping // self._block_size
        self._offsets = metadata.slot_mapping % self._block_size

    def _write(self, k: Tensor, v: Tensor, layer_id: int) -> None:
        """Put the step's keys and values, each at least [tokens, heads, head_dim], into a layer's pages.

        Those without heads are left out.
        """
        for part, rows in enumerate((k, v) if self._has_values else (k,)):
            if rows.shape[1]:
                write_rows(self._layers[layer_id], part, self._blocks, self._offsets, rows[: len(self._blocks)])

    def warm_up(self) -> None:
        """Nothing is compiled here."""
