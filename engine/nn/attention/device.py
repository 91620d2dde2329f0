"""Protocols say what steps of a CUDA device ask of attention, over heads' pages or over latents.

any batch      plan_with, then forward for each layer
graphs         for_graph: attention of a number of one-token rows, captured once, planned before each replay
pieces         what buffers must hold that attention is given and gives between two graphs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .base import AttentionBackend, AttentionMetadata
from .page_index import PageIndex


class GraphAttention(Protocol):
    """Attention within a graph: `forward` is captured, `plan` is called before each replay, outside of it."""

    def plan(self, indptr: Tensor, last_page_len: Tensor, num_pages: int) -> None:
        """Split the rows' work and queue its upload, with that of `indptr` [rows + 1] and `last_page_len` [rows], both
        in pinned memory that stays as it is until they are uploaded. The page ids are uploaded already.

        What a graph has captured of a plan depends on the number of rows alone.
        """
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        """Do as `AttentionBackend.forward`."""
        ...


class DeviceAttention(AttentionBackend, Protocol):
    """Attention on CUDA."""

    dtype: torch.dtype  # of queries, keys and values as they come, and of results
    heads_size: int  # numbers of a token's queries, keys and values, of the layer that has most
    result_size: int  # numbers of a token's result, of the layer that has most
    keeps_values: bool  # else they are a part of keys
    value_dim: int | None  # of a head's result; None: as many numbers as a query has

    def plan_with(self, metadata: AttentionMetadata, more: Sequence[Tensor]) -> list[Tensor]:
        """Plan, and upload further arrays of int32 together with the plan's. Returns those, on the device."""
        ...

    def plan_nothing(self) -> None:
        """Plan a step of padding alone."""
        ...

    @property
    def positions(self) -> Tensor:
        """Return the position of each of the planned step's tokens, [num_tokens] int32 on the device."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int, out: Tensor | None = None) -> Tensor:
        """Do as `AttentionBackend.forward`. `out`: where the result goes, of its shape and contiguous."""
        ...

    def for_graph(self, index: PageIndex) -> GraphAttention:
        """Make decode of as many rows as `index` has, reading its tensors, which stay where they are."""
        ...
