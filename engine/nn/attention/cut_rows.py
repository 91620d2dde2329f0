"""A step as layers see it that do not read rows from their beginning: each row is cut to the pages that they read.

    chunks of 4            row of tokens 0 to 9, of which 6 to 9 are fed      rows of 2 and 2 tokens, of 4 and 2 keys
    a window of 3          the same row, in blocks of 4                       its tokens, and keys from token 4 on

A kernel that is given a whole row may read all of it, and give what a window hides a weight of zero, which does not
silence NaN: what an earlier owner left in a page that nobody wrote must not be among it. Chunks are whole blocks, so a
row that was cut is all that its tokens see; of a window's first page the kernel still hides a part.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ....models.parts.chunks import Chunk
from .base import AttentionMetadata


class Cut(Protocol):
    """Cuts rows for the layers of one window."""

    max_pages: int  # of a row of one token

    def rows(self, metadata: AttentionMetadata) -> AttentionMetadata:
        """Cut a step's rows. Those of one token stay the leading ones."""
        ...

    def first_page(self, positions: Tensor) -> Tensor:
        """Return, of rows of one token at these positions, the first page that is read."""
        ...


class ChunkCut:
    """Rows of layers that attend in chunks: a row's tokens of a chunk are a row, which begins with the chunk."""

    def __init__(self, chunk: int, block_size: int) -> None:
        assert chunk % block_size == 0, (chunk, block_size)
        self._chunk, self._block_size = chunk, block_size
        self.max_pages = chunk // block_size

    def first_page(self, positions: Tensor) -> Tensor:
        return positions // self._chunk * self.max_pages

    def rows(self, metadata: AttentionMetadata) -> AttentionMetadata:
        chunk, block_size = self._chunk, self._block_size
        qo_indptr, kv_indptr, kv_lens = [0], [0], list[int]()
        tables, ends = list[Tensor](), list[int]()
        fed, pages = metadata.qo_indptr.tolist(), metadata.paged_kv_indptr.tolist()
        for row, kv_len in enumerate(metadata.kv_lens):
            start = kv_len - (fed[row + 1] - fed[row])
            for first in range(start // chunk * chunk, kv_len, chunk):
                end = min(kv_len, first + chunk)
                table = slice(pages[row] + first // block_size, pages[row] - (-end // block_size))
                tables.append(metadata.paged_kv_indices[table])
                qo_indptr.append(qo_indptr[-1] + end - max(start, first))
                kv_indptr.append(kv_indptr[-1] + len(tables[-1]))
                kv_lens.append(end - first)
                ends.append(end)
        return AttentionMetadata(
            num_decode_rows=metadata.num_decode_rows,
            qo_indptr=torch.tensor(qo_indptr, dtype=torch.int32),
            paged_kv_indptr=torch.tensor(kv_indptr, dtype=torch.int32),
            paged_kv_indices=torch.cat(tables),
            paged_kv_last_page_len=torch.tensor([(end - 1) % block_size + 1 for end in ends], dtype=torch.int32),
            kv_lens=tuple(kv_lens),
            slot_mapping=metadata.slot_mapping,
        )


class WindowCut:
    """Rows of layers with a window that moves with the token: they begin with the page that their first token reads."""

    def __init__(self, window: int, block_size: int) -> None:
        self._window, self._block_size = window, block_size
        self.max_pages = (window + block_size - 2) // block_size + 1

    def first_page(self, positions: Tensor) -> Tensor:
        return (positions - (self._window - 1)).clamp_(min=0) // self._block_size

    def rows(self, metadata: AttentionMetadata) -> AttentionMetadata:
        kv_lens = torch.tensor(metadata.kv_lens, dtype=torch.int32)
        firsts = self.first_page(kv_lens - metadata.qo_indptr.diff())
        indptr = torch.zeros_like(metadata.paged_kv_indptr)
        torch.cumsum(metadata.paged_kv_indptr.diff() - firsts, 0, dtype=torch.int32, out=indptr[1:])
        begins = (metadata.paged_kv_indptr[:-1] + firsts).tolist()
        tables = [metadata.paged_kv_indices[a:b] for a, b in zip(begins, metadata.paged_kv_indptr[1:], strict=True)]
        return AttentionMetadata(
            num_decode_rows=metadata.num_decode_rows,
            qo_indptr=metadata.qo_indptr,
            paged_kv_indptr=indptr,
            paged_kv_indices=torch.cat(tables),
            paged_kv_last_page_len=metadata.paged_kv_last_page_len,
            kv_lens=tuple((kv_lens - firsts * self._block_size).tolist()),
            slot_mapping=metadata.slot_mapping,
        )


def cut_of(window: int | None, block_size: int) -> Cut | None:
    """Return how rows are cut for layers of a window; None: they are not."""
    if window is None:
        return None
    return ChunkCut(window, block_size) if isinstance(window, Chunk) else WindowCut(window, block_size)
