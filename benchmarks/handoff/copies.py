"""What a handoff is measured against: the same bytes moved without any protocol.

writev   process_vm_writev into the other process, with the handoff's own pieces, 1,024 in a call
plain    one copy of as many bytes inside this process: memcpy, or the device's copy on a GPU
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from time import perf_counter

import torch

from kvferry.transfer.backends.base import page_rows
from kvferry.transfer.backends.host_memory import HostMark, HostWindow, Runs


class Copies:
    """`pages` is the source of both."""

    def __init__(self, pages: torch.Tensor, max_bytes: int, mark: HostMark) -> None:
        self._source = page_rows(pages).view(-1)
        self._target = torch.ones(max_bytes, dtype=torch.uint8, device=pages.device)
        self._window = None if pages.is_cuda else HostWindow.open(mark)

    def writev_s(self, writes: Sequence[tuple[Runs, Runs]]) -> float | None:
        """None: a GPU's memory, or the kernel does not let us."""
        if self._window is None:
            return None
        start_s = perf_counter()
        for ours, theirs in writes:
            self._window.write(ours, theirs)
        return perf_counter() - start_s

    def plain_s(self, num_bytes: int) -> float:
        if not self._source.is_cuda:
            start_s = perf_counter()
            ctypes.memmove(self._target.data_ptr(), self._source.data_ptr(), num_bytes)
            return perf_counter() - start_s
        torch.cuda.synchronize()
        start_s = perf_counter()
        self._target[:num_bytes].copy_(self._source[:num_bytes])
        torch.cuda.synchronize()
        return perf_counter() - start_s

    def close(self) -> None:
        if self._window is not None:
            self._window.close()
