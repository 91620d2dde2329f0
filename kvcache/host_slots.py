"""Blocks in host memory: the engine's side of swapping and of the prefix cache's tiers.

A slot is one block of all layers, contiguous, so that a block is one copy each way. Which block lies in which slot,
and whether that pays, is decided elsewhere (`kvcache/swap.py`, `prefix_cache.py`); here are the bytes. The first slots
are for preempted sequences, the others for the prefix cache. A step copies out first,
then in, then computes: a block that was copied out may be filled anew in the same step.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..common.config import EngineConfig
from ..common.errors import ConfigError
from ..common.kv_spec import KVCacheSpec
from ..common.machine import free_memory_bytes
from .frames import frames_of

# Defaults of a rank's host memory, where settings give no sizes. More keeps more preempted sequences, or prefixes, from
# being computed again, and takes memory, pinned on CUDA, from everything else on the machine.
_CUDA_BYTES = 4 << 30  # for swapping, at most
_CUDA_SHARE = 0.1  # of the machine's free memory, for swapping, at most
_CUDA_CACHE_BYTES = 8 << 30  # for the prefix cache, at most
_CUDA_CACHE_SHARE = 0.1  # of the machine's free memory, for the prefix cache, at most
_STAGING_SHARE = 0.25  # of a CPU's KV cache: what is read from disk comes there first
# At least; fewer would leave a long prompt's reads waiting for one another. Blocks of models with states are long, and
# tens of megabytes each: as many of them as of short ones would take more than the KV cache does.
_MIN_STAGING_TOKENS = 1024
_MIN_STAGING_BLOCKS = 4
_CPU_SHARE = 0.1  # of the KV cache, for swapping: a copy there only moves blocks within the same memory
_BLOCKS_AT_ONCE = 16  # gathered on a GPU in one piece: memory is scarce where blocks are swapped
# Pinned at once: torch rounds pinned memory up to a power of two, so one piece of 9 GiB would take 16.
_PINNED_BYTES = 1 << 30


def num_swap_blocks(
    config: EngineConfig, spec: KVCacheSpec, device: torch.device, *, num_blocks: int, tp_size: int
) -> int:
    """Count one rank's slots for swapping; every rank has as many."""
    if config.swap_space is not None:
        return config.swap_space // spec.block_bytes(tp_size)
    if device.type == "cuda":
        num_bytes = min(_CUDA_BYTES, int(_CUDA_SHARE * free_memory_bytes() / tp_size))
        return num_bytes // spec.block_bytes(tp_size)
    return int(_CPU_SHARE * num_blocks)


def num_host_blocks(
    config: EngineConfig, spec: KVCacheSpec, device: torch.device, *, num_blocks: int, tp_size: int
) -> int:
    """Count one rank's slots for the prefix cache. Raises ConfigError."""
    has_disk = config.disk_cache_dir is not None
    if not config.enable_prefix_caching:
        if has_disk or config.host_cache_memory_bytes:
            raise ConfigError(
                "host_cache_memory_bytes, disk_cache_dir: there is no prefix cache to keep there; enable it"
            )
        return 0
    if config.host_cache_memory_bytes is not None:
        count = config.host_cache_memory_bytes // spec.block_bytes(tp_size)
    elif device.type == "cuda":
        num_bytes = min(_CUDA_CACHE_BYTES, int(_CUDA_CACHE_SHARE * free_memory_bytes() / tp_size))
        count = num_bytes // spec.block_bytes(tp_size)
    else:  # the device's memory is the host's
        least = max(_MIN_STAGING_BLOCKS, spec.num_blocks_for(_MIN_STAGING_TOKENS))
        count = max(least, int(_STAGING_SHARE * num_blocks)) if has_disk else 0
    if has_disk and count < 2:
        raise ConfigError(
            f"disk_cache_dir: blocks are read into host memory first, and host_cache_memory_bytes = "
            f"{config.host_cache_memory_bytes:,} holds {count} of {spec.block_bytes(tp_size):,} bytes; leave it out or "
            "give it more"
        )
    return count


class SwapPages:
    """The slots of one rank. Used by the engine's thread; on a GPU all is queued on its current stream."""

    def __init__(self, pages: Tensor, spec: KVCacheSpec, num_slots: int) -> None:
        """`pages`: the KV cache, [layers, blocks, ...]. Raises ConfigError."""
        # 8-bit floats are storage: few of torch's operations know them.
        self._pages = pages.view(torch.uint8) if pages.dtype.itemsize == 1 else pages
        self._rows = self._pages.view(-1, *self._pages.shape[2:])
        self._thin_places = range(frames_of(spec).num_full)
        self._is_cuda = pages.is_cuda
        self.slot_bytes = pages[:, 0].numel() * pages.element_size()
        self._slots_of_piece = max(1, _PINNED_BYTES // self.slot_bytes) if self._is_cuda else max(1, num_slots)
        shape = (pages.shape[0], *pages.shape[2:])
        sizes = [min(self._slots_of_piece, num_slots - at) for at in range(0, num_slots, self._slots_of_piece)]
        try:  # on a CPU the kernel gives memory as slots are written to
            self._host = [torch.empty((n, *shape), dtype=self._pages.dtype, pin_memory=self._is_cuda) for n in sizes]
        except (RuntimeError, MemoryError) as error:
            raise ConfigError(
                f"--swap-space, --host-cache-memory-bytes: {num_slots * self.slot_bytes:,} bytes of host memory "
                f"cannot be had: {error}"
            ) from error
        self._bytes = [piece.view(torch.uint8).numpy().data.cast("B") for piece in self._host]
        self._times: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._copy_s = 0.0

    def slot(self, slot: int) -> memoryview:
        """Return a slot's bytes, from any thread. Whoever reads or writes them keeps copies off the slot meanwhile."""
        piece, place = divmod(slot, self._slots_of_piece)
        return self._bytes[piece][place * self.slot_bytes : (place + 1) * self.slot_bytes]

    def _slot(self, slot: int) -> Tensor:
        piece, place = divmod(slot, self._slots_of_piece)
        return self._host[piece][place]

    def settle(self) -> None:
        """Wait for the copies that are under way."""
        if self._is_cuda:
            torch.cuda.current_stream(self._pages.device).synchronize()

    def copy(self, swap_out: Sequence[tuple[int, int]], swap_in: Sequence[tuple[int, int]]) -> None:
        """Copy (block, slot) pairs out to the host, then (slot, block) pairs in from it. `~block`: of a thin block,
        whose slot has its pages where a whole one's are.
        """
        self._times, self._copy_s = None, 0.0
        if not swap_out and not swap_in:
            return
        if self._is_cuda:
            self._copy_cuda(swap_out, swap_in)
            return
        began = time.perf_counter()
        for block, slot in swap_out:
            for place, page in self._pages_of(block):
                self._slot(slot)[place].copy_(page)
        for slot, block in swap_in:
            for place, page in self._pages_of(block):
                page.copy_(self._slot(slot)[place])
        self._copy_s = time.perf_counter() - began

    def _pages_of(self, block: int) -> Iterable[tuple[int | slice, Tensor]]:
        """Return what copies of a block touch: places in a slot, and the pages."""
        if block >= 0:
            return [(slice(None), self._pages[:, block])]
        return ((place, self._rows[place * self._pages.shape[1] + ~block]) for place in self._thin_places)

    def _rows_of(self, blocks: Iterable[int]) -> Tensor:
        """Index the pages that copies of these blocks touch, block by block."""
        num_places, stride = self._pages.shape[:2]
        named = [(block, range(num_places)) if block >= 0 else (~block, self._thin_places) for block in blocks]
        rows = [place * stride + block for block, places in named for place in places]
        return torch.tensor(rows, device=self._pages.device)

    def _parts_of(self, slot: int, block: int) -> list[Tensor]:
        """View a slot's part that a copy of this block touches, in pieces that lie in a row."""
        return (
            [self._slot(slot)] if block >= 0 else [self._slot(slot)[place : place + 1] for place in self._thin_places]
        )

    def _copy_cuda(self, swap_out: Sequence[tuple[int, int]], swap_in: Sequence[tuple[int, int]]) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for piece in _pieces(swap_out):
            gathered = self._rows.index_select(0, self._rows_of(block for block, _ in piece))
            parts = [part for block, slot in piece for part in self._parts_of(slot, block)]
            for part, source in zip(parts, torch.split(gathered, [len(part) for part in parts]), strict=True):
                part.copy_(source, non_blocking=True)
        for piece in _pieces(swap_in):
            parts = [part for slot, block in piece for part in self._parts_of(slot, block)]
            gathered = self._rows.new_empty((sum(map(len, parts)), *self._rows.shape[1:]))
            for part, target in zip(parts, torch.split(gathered, [len(part) for part in parts]), strict=True):
                target.copy_(part, non_blocking=True)
            self._rows.index_copy_(0, self._rows_of(block for _, block in piece), gathered)
        end.record()
        self._times = (start, end)

    @property
    def copy_s(self) -> float:
        """Return the seconds that the last `copy` took. On a GPU: once the step has ended."""
        if self._times is not None:
            start, end = self._times
            return float(start.elapsed_time(end)) / 1000
        return self._copy_s


def _pieces(pairs: Sequence[tuple[int, int]]) -> list[Sequence[tuple[int, int]]]:
    return [pairs[first : first + _BLOCKS_AT_ONCE] for first in range(0, len(pairs), _BLOCKS_AT_ONCE)]
