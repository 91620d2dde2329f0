"""The pages of both ends: random content, and a checksum that tells whether the same bytes are in other blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.kvcache.pages import allocate_pages


def checksum(pages: torch.Tensor, blocks: Sequence[int]) -> int:
    """Of the bytes of these blocks, each weighted by its place. Computed where the pages are."""
    index = torch.tensor(blocks, device=pages.device)
    num_words = pages[0, 0].numel() * pages.element_size() // 8
    weights = torch.Generator().manual_seed(1)
    rows = torch.randint(2**62, (len(blocks), 1), generator=weights).to(pages.device)
    columns = torch.randint(2**62, (num_words,), generator=weights).to(pages.device)
    value = 0
    for layer in pages:
        words = layer.flatten(1).view(torch.int64)[index]  # [num_blocks, num_words]
        weighted = (words * columns).sum(dim=1, keepdim=True) * rows  # overflow wraps
        value = (value * 31 + int(weighted.sum())) % 2**53
    return value


def make_pages(spec: KVCacheSpec, num_blocks: int, device: str) -> torch.Tensor:
    """Random content; every page of memory has been touched."""
    pages = allocate_pages(spec, num_blocks, tp_size=1, dtype=torch.bfloat16, device=torch.device(device))
    pages.view(torch.int16).random_()
    finish(pages)
    return pages


def finish(pages: torch.Tensor) -> None:
    """A GPU's work on the pages is done: transfers do not wait for its streams."""
    if pages.is_cuda:
        torch.cuda.synchronize(pages.device)
