"""One interface over the paged KV cache: plan once per step, then once per layer write K and V and attend.

The cache is [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim] (HND), or, of latents (`Scores.value_dim`),
[num_layers, num_blocks, 1, 1, block_size, head_dim]: no V, for it is a part of K. A step's tokens are packed in a
line, rows of one token first; `AttentionMetadata` says where each row's tokens and pages are. Model code does not
know which backend runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# A model's pages: [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim], or each layer's by itself. A layer's
# pages stand equally far apart, as keys and values in a page do, and heads; other layers' may lie between them.
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

    def plan(self, metadata: AttentionMetadata) -> None:
        """Prepare a step. What `forward` needs is kept until the next plan."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        """Write K and V [tokens, num_kv_heads, head_dim] into the pages `layer_id`, then attend with
        q [tokens, num_qo_heads, head_dim]. Returns [tokens, num_qo_heads, head_dim or value_dim], contiguous and valid
        until the next call. K and V without heads are not written: the pages have another layer's. Rows past the plan's
        num_tokens are padding: not written, and zero in the result.
        """
        ...

    def warm_up(self) -> None:
        """Compile or load what the first steps would. Before any page is of use: it overwrites some."""
        ...


def check_pages(pages: torch.Tensor, num_qo_heads: int) -> None:
    assert pages.dim() == 6 and pages.is_contiguous(), pages.shape
    assert num_qo_heads % pages.shape[3] == 0, (num_qo_heads, pages.shape)


class RowSteps(NamedTuple):
    """Rows of `heads_of_pages` are so many apart: of a page and the next, of its keys and its values, of two heads."""

    page: int
    part: int
    head: int

    def first_of_keys(self, blocks: Tensor, num_heads: int) -> Tensor:
        """Block ids [..., pages] -> the rows of their heads' keys, [..., num_heads, pages] int64."""
        heads = torch.arange(num_heads).unsqueeze(1) * self.head
        return blocks.long().unsqueeze(-2) * self.page + heads


def heads_of_pages(layer: Tensor) -> Tensor:
    """View a layer's pages [num_blocks, 2, heads, block_size, head_dim] as rows, [rows, block_size * head_dim].

    Each is a head's keys or values of a block, or another layer's.
    """
    row_size, steps = layer.shape[3] * layer.shape[4], row_steps(layer)
    last = sum((count - 1) * step for count, step in zip(layer.shape[:3], steps, strict=True))
    return layer.as_strided((last + 1, row_size), (row_size, 1))


def row_steps(layer: Tensor) -> RowSteps:
    row_size = layer.shape[3] * layer.shape[4]
    assert layer[0, 0, 0].is_contiguous() and not any(step % row_size for step in layer.stride()[:3]), layer.stride()
    return RowSteps(*(step // row_size for step in layer.stride()[:3]))
