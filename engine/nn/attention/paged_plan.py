"""A step's rows as torch's attention on a CPU takes them (`paged_torch.py`): which pages are gathered together.

Rows of one token go in groups of similar length, padded to the longest, and chunks of prompts one by one; pages that
nobody of them sees are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....models.parts.chunks import first_seen
from .base import AttentionMetadata, RowSteps


@dataclass(slots=True, frozen=True)
class DecodeGroup:
    """Rows of one token whose contexts are gathered together, `num_keys` keys each."""

    rows: Tensor | None  # [n] token indices; None: the first n in order
    num_rows: int
    num_keys: int  # a whole number of pages
    k_index: Tensor  # [n * num_kv_heads * pages] rows of the layer seen as [-1, block_size * head_dim]
    v_index: Tensor
    hidden: Tensor  # [n, 1, 1, num_keys] bool: gathered, and not seen
    # [hidden of all KV heads] the same as rows of V, which is [n * num_kv_heads * num_keys, head_dim]
    hidden_values: Tensor


@dataclass(slots=True, frozen=True)
class PrefillRow:
    """One row's chunk: queries at positions [kv_len - num_tokens, kv_len), keys from `first_key` on."""

    token: int  # where the chunk starts in the packed line
    num_tokens: int
    kv_len: int
    first_key: int  # a page's border at or before the first key that any query sees
    num_keys: int  # gathered, a whole number of pages
    k_index: Tensor  # [num_kv_heads, pages]
    v_index: Tensor


@dataclass(slots=True, frozen=True)
class WindowPlan:
    """The part of a step's plan that layers of one sliding window share."""

    window: int | None
    groups: list[DecodeGroup]
    prefill: list[PrefillRow]


@dataclass(slots=True, frozen=True, kw_only=True)
class Planner:
    """Plans steps over pages of one shape."""

    num_kv_heads: int
    block_size: int
    steps: RowSteps  # from one row of a layer to others
    key_bytes: int  # of one token's keys of a layer, gathered
    group_bytes: int  # that the gathered keys of a group take, at most

    def plan(self, metadata: AttentionMetadata, window: int | None) -> WindowPlan:
        """Plan the layers of one window."""
        groups = [self._plan_group(metadata, rows, window) for rows in self._group_rows(metadata, window)]
        prefill = [
            self._plan_prefill(metadata, row, window) for row in range(metadata.num_decode_rows, metadata.num_rows)
        ]
        return WindowPlan(window, groups, prefill)

    def _group_rows(self, metadata: AttentionMetadata, window: int | None) -> list[list[int]]:
        """Decode rows by length, cut where a group's keys outgrow the cache or padding would cost too much."""
        lens = [kv_len if window is None else min(kv_len, window) for kv_len in metadata.kv_lens]
        groups: list[list[int]] = []
        for row in sorted(range(metadata.num_decode_rows), key=lens.__getitem__):
            group = groups[-1] if groups else []
            fits = (len(group) + 1) * lens[row] * self.key_bytes <= self.group_bytes
            if group and fits and lens[row] <= 2 * lens[group[0]] + 128:
                group.append(row)
            else:
                groups.append([row])
        return [sorted(group) for group in groups]

    def _plan_group(self, metadata: AttentionMetadata, rows: list[int], window: int | None) -> DecodeGroup:
        kv_lens = torch.tensor([metadata.kv_lens[row] for row in rows])
        first_keys = torch.tensor([first_seen(metadata.kv_lens[row] - 1, window) for row in rows])
        first_pages = first_keys // self.block_size
        num_pages = (kv_lens + self.block_size - 1) // self.block_size - first_pages
        pages = int(num_pages.max())
        row_ids = torch.tensor(rows)
        starts = metadata.paged_kv_indptr[row_ids].long() + first_pages
        columns = torch.arange(pages).minimum(num_pages.unsqueeze(1) - 1)  # padding repeats the last page
        blocks = metadata.paged_kv_indices[starts.unsqueeze(1) + columns]
        k_index = self.steps.first_of_keys(blocks, self.num_kv_heads)
        positions = first_pages.unsqueeze(1) * self.block_size + torch.arange(pages * self.block_size)
        hidden = (positions >= kv_lens.unsqueeze(1)) | (positions < first_keys.unsqueeze(1))
        of_heads = hidden.unsqueeze(1).expand(-1, self.num_kv_heads, -1)
        return DecodeGroup(
            rows=None if rows == list(range(len(rows))) else row_ids,
            num_rows=len(rows),
            num_keys=pages * self.block_size,
            k_index=k_index.reshape(-1),
            v_index=(k_index + self.steps.part).reshape(-1),
            hidden=hidden[:, None, None, :],
            hidden_values=of_heads.reshape(-1).nonzero().squeeze(1),
        )

    def _plan_prefill(self, metadata: AttentionMetadata, row: int, window: int | None) -> PrefillRow:
        token, end = metadata.qo_indptr[row : row + 2].tolist()
        page, last = metadata.paged_kv_indptr[row : row + 2].tolist()
        kv_len = metadata.kv_lens[row]
        first_page = first_seen(kv_len - (end - token), window) // self.block_size
        k_index = self.steps.first_of_keys(metadata.paged_kv_indices[page + first_page : last], self.num_kv_heads)
        return PrefillRow(
            token=token,
            num_tokens=end - token,
            kv_len=kv_len,
            first_key=first_page * self.block_size,
            num_keys=(last - page - first_page) * self.block_size,
            k_index=k_index,
            v_index=k_index + self.steps.part,
        )
