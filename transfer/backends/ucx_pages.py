"""Our registered pages as runs of bytes: gathered into one buffer to be sent, scattered from the one that came."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import page_rows

Runs = Sequence[tuple[int, int]]  # (offset in the page, bytes), the same of each page


class UcxPages:
    """`UcxPages` are the pages of one registration, [layers, blocks, 2 or 1, heads, block_size, head_dim]."""

    def __init__(self, pages: torch.Tensor) -> None:
        self.pages = pages
        self._rows = page_rows(pages)  # [num_pages, page_bytes] uint8

    @property
    def device(self) -> torch.device:
        return self._rows.device

    def has(self, pages: Sequence[int], runs: Runs) -> bool:
        """Tell whether these runs of these pages lie within ours, and none is empty."""
        num_pages, page_bytes = self._rows.shape
        return all(page < num_pages for page in pages) and all(0 < size <= page_bytes - offset for offset, size in runs)

    def gather(self, pages: Sequence[int], runs: Runs) -> torch.Tensor:
        """Return the runs of these pages, one after the other: [num_bytes] uint8."""
        index = torch.tensor(pages, device=self._rows.device)
        return torch.cat([self._rows[index, offset : offset + size].reshape(-1) for offset, size in runs])

    def scatter(self, pages: Sequence[int], runs: Runs, staging: torch.Tensor) -> int:
        """Do the reverse. Returns the number of bytes."""
        index, start = torch.tensor(pages, device=self._rows.device), 0
        for offset, size in runs:
            end = start + len(pages) * size
            self._rows[index, offset : offset + size] = staging[start:end].view(-1, size)
            start = end
        if self._rows.is_cuda:
            torch.cuda.current_stream(self._rows.device).synchronize()
        return start
