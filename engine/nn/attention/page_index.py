"""A step's arrays as CUDA's attention reads them, uploaded in one piece.

Small arrays that lie in ordinary memory make the host wait for the stream, each by itself. So all of a step's are laid
side by side in one pinned array: one copy, which nobody waits for. What planning reads on the host, and uploads once
more by itself, are parts of that array too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import AttentionMetadata

_ALIGNED = 4  # numbers: each part begins at a multiple of 16 bytes


@dataclass(slots=True, frozen=True)
class PageIndex:
    """An index on the device: the pages of each row, and the row and position of each of the step's tokens."""

    row_of_token: Tensor  # [num_tokens] int32
    positions: Tensor  # [num_tokens] int32
    paged_kv_indptr: Tensor  # [rows + 1] int32
    paged_kv_indices: Tensor  # [at least num_pages] int32
    paged_kv_last_page_len: Tensor  # [rows] int32

    @classmethod
    def of_nothing(cls, device: torch.device) -> PageIndex:
        """Make the index of a step of padding alone."""
        nothing = torch.empty(0, dtype=torch.int32, device=device)
        return cls(nothing, nothing, nothing, nothing, nothing)


@dataclass(slots=True, frozen=True)
class StepIndex:
    """An index with its parts on the host, in pinned memory: of all rows, and of those that are chunks alone."""

    index: PageIndex
    paged_kv_indptr: Tensor
    paged_kv_last_page_len: Tensor
    chunk_qo_indptr: Tensor  # [chunks + 1] int32, from 0
    chunk_kv_indptr: Tensor  # [chunks + 1] int32, from 0
    chunk_kv_lens: Tensor  # [chunks] int32
    more: list[Tensor]  # on the device: what came along


def upload_step(metadata: AttentionMetadata, device: torch.device, more: Sequence[Tensor] = ()) -> StepIndex:
    """Queue the upload of a step's index and of further arrays of int32."""
    rows, lengths = metadata.num_decode_rows, metadata.qo_indptr.diff()
    row_of_token = torch.repeat_interleave(torch.arange(metadata.num_rows, dtype=torch.int32), lengths)
    kv_lens = torch.tensor(metadata.kv_lens, dtype=torch.int32)
    starts = kv_lens - lengths - metadata.qo_indptr[:-1]
    positions = torch.arange(metadata.num_tokens, dtype=torch.int32) + starts[row_of_token]
    indptr, last = metadata.paged_kv_indptr, metadata.paged_kv_last_page_len
    chunk_qo, chunk_kv = (each[rows:] - each[rows] for each in (metadata.qo_indptr, indptr))
    parts = (row_of_token, positions, indptr, metadata.paged_kv_indices, last, chunk_qo, chunk_kv, kv_lens[rows:])
    host, there = upload_ints([*parts, *more], device)
    return StepIndex(
        index=PageIndex(*there[:5]),
        paged_kv_indptr=host[2],
        paged_kv_last_page_len=host[4],
        chunk_qo_indptr=host[5],
        chunk_kv_indptr=host[6],
        chunk_kv_lens=host[7],
        more=there[len(parts) :],
    )


def smallest_step(block: int) -> AttentionMetadata:
    """Return a step for warming up: a decode row of one token and a chunk of two, both in this block."""
    return AttentionMetadata(
        num_decode_rows=1,
        qo_indptr=torch.tensor([0, 1, 3], dtype=torch.int32),
        paged_kv_indptr=torch.arange(3, dtype=torch.int32),
        paged_kv_indices=torch.full((2,), block, dtype=torch.int32),
        paged_kv_last_page_len=torch.tensor([1, 2], dtype=torch.int32),
        kv_lens=(1, 2),
        slot_mapping=torch.zeros(3, dtype=torch.int64),
    )


def upload_ints(parts: Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Queue one upload of arrays of int32. Returns them in pinned memory, and on the device."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] - (-len(part) // _ALIGNED) * _ALIGNED)
    host = torch.empty(starts[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    places = [slice(start, start + len(part)) for start, part in zip(starts, parts, strict=False)]
    for place, part in zip(places, parts, strict=True):
        host[place] = part
    there = host.to(device, non_blocking=True)
    return [host[place] for place in places], [there[place] for place in places]
