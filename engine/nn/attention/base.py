"""One interface over the paged KV cache: plan once per step, then once per layer write K and V and attend.

The cache is [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim] (HND), or, of latents (`Scores.value_dim`),
[num_layers, num_blocks, 1, 1, block_size, head_dim]: no V, for it is a part of K. A step's tokens are packed in a
line, rows of one token first; `AttentionMetadata` says where each row's tokens and pages are. Model code does not
know which backend runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# A model's pages: [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim], or each layer's by itself. Pages of
# one layer stand equally far apart, and nearer than that where other layers' lie between them.
LayerPages = Tensor | Sequence[Tensor]


@dataclass(slots=True, frozen=True, kw_only=True)
class Scores:
    """Scores are made of queries' products with keys by these, and weighed against each other and against sinks."""

    scale: float | None = None  # None: by the head's size
    cap: float | None = None  # what scores come near to and never reach
    sinks: Sequence[Tensor] | None = None  # of each layer: [num_qo_heads], a score that no value goes with
    value_dim: int | None = None  # of latents: so many numbers of a key, the first ones, are its value; None: V's

    def scale_of(self, head_dim: int) -> float:
        return float(head_dim**-0.5) if self.scale is None else self.scale


PLAIN_SCORES = Scores()


@dataclass(slots=True, frozen=True)
class AttentionMetadata:
    """The batch as kernels see it, on the host (the engine fills it). Row i feeds query tokens
    [qo_indptr[i], qo_indptr[i + 1]) of the packed line, the last ones of its kv_len tokens."""

    num_decode_rows: int  # leading rows of one token each
    qo_indptr: Tensor  # [rows + 1] int32
    paged_kv_indptr: Tensor  # [rows + 1] int32
    paged_kv_indices: Tensor  # [num_pages] int32: block ids, row after row
    paged_kv_last_page_len: Tensor  # [rows] int32, 1 .. block_size
    kv_lens: tuple[int, ...]  # [rows] tokens with K and V after this step
    slot_mapping: Tensor  # [num_tokens] int64: block * block_size + offset where each token's K and V go

    @property
    def num_rows(self) -> int:
        return len(self.kv_lens)

    @property
    def num_tokens(self) -> int:
        return self.slot_mapping.shape[0]


class AttentionBackend(Protocol):
    """Attention of one rank's heads over its pages."""

    name: str

    def plan(self, metadata: AttentionMetadata) -> None:
        """Prepare a step. What `forward` needs is kept until the next plan."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        """Write K and V [tokens, num_kv_heads, head_dim] into the layer's pages, then attend with
        q [tokens, num_qo_heads, head_dim]. Returns [tokens, num_qo_heads, head_dim or value_dim], contiguous and valid
        until the next call. Rows past the plan's num_tokens are padding: not written, and zero in the result.
        """
        ...

    def warm_up(self) -> None:
        """Compile or load what the first steps would. Before any page is of use: it overwrites some."""
        ...


def check_pages(pages: torch.Tensor, num_qo_heads: int) -> None:
    assert pages.dim() == 6 and pages.is_contiguous(), pages.shape
    assert num_qo_heads % pages.shape[3] == 0, (num_qo_heads, pages.shape)


def heads_of_pages(layer: torch.Tensor) -> torch.Tensor:
    """View a layer's pages as rows, [rows, block_size * head_dim]: page b's heads, K's before V's, begin at row
    b * rows_apart(layer).
    """
    num_blocks, num_parts, num_heads, block_size, head_dim = layer.shape
    num_rows = (num_blocks - 1) * rows_apart(layer) + num_parts * num_heads
    return layer.as_strided((num_rows, block_size * head_dim), (block_size * head_dim, 1))


def rows_apart(layer: torch.Tensor) -> int:
    """Count the rows of `heads_of_pages` from a page to the next."""
    row_size = layer.shape[3] * layer.shape[4]
    assert layer[0].is_contiguous() and layer.stride(0) % row_size == 0, (layer.shape, layer.stride())
    return layer.stride(0) // row_size
