"""The page tensor: one allocation per rank, [num_layers, num_blocks, *spec.page_shape()].

It is allocated once, as zeros (a page that was never written must not hold NaN), and registered once with the
transfer agent; which block holds what is `BlockPool`'s concern.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import torch

from ..common.config import EngineConfig
from ..common.errors import ConfigError
from ..common.kv_spec import KVCacheSpec
from ..common.machine import free_memory_bytes
from .frames import MIN_CACHE_TOKENS, too_small_a_cache

_HUGE_PAGE_BYTES = 2 << 20
# A CPU's KV cache where settings give no size: the smaller of both. More holds more sequences and prefixes, but the
# machine is not ours alone, and each of its workers takes as much.
_CPU_BYTES = 2 << 30
_CPU_SHARE = 0.1  # of free memory
_CACHE_DTYPES = {"bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


def num_blocks_for_memory(
    config: EngineConfig, spec: KVCacheSpec, device: torch.device, *, tp_size: int, max_model_len: int
) -> int:
    """Count blocks that fit into the memory of one rank's cache. Raises ConfigError if those are too few to serve."""
    num_bytes = config.kv_cache_memory_bytes or _default_bytes(config, device)
    block_bytes = spec.block_bytes(tp_size)
    if why := too_small_a_cache(num_bytes, block_bytes, spec.num_blocks_for(min(max_model_len, MIN_CACHE_TOKENS))):
        raise ConfigError(why)
    return num_bytes // block_bytes


def cache_dtype(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type of keys and values in the pages of a model that computes in `dtype`. Raises ConfigError."""
    wanted = _CACHE_DTYPES.get(config.kv_cache_dtype, dtype)
    if wanted == torch.float8_e4m3fn and device.type != "cuda":
        raise ConfigError(
            "kv_cache_dtype = fp8 needs a CUDA device: the CPU's attention reads no 8-bit floats; use int8"
        )
    if wanted == torch.int8 and device.type != "cpu":
        raise ConfigError("kv_cache_dtype = int8 is read on CPUs alone; use fp8 on a GPU")
    if wanted.itemsize > 1 and wanted != dtype:
        raise ConfigError(f"kv_cache_dtype = {config.kv_cache_dtype} does not go with a model in {dtype}; use auto")
    return wanted


def num_spare_blocks(device: torch.device) -> int:
    """Count the blocks of the allocation behind those that the pool hands out. Padding rows on a GPU write there."""
    return 1 if device.type == "cuda" else 0


def allocate_pages(
    spec: KVCacheSpec, num_blocks: int, *, tp_size: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    shape = (spec.num_layers, num_blocks, *spec.page_shape(tp_size))
    num_bytes = num_blocks * spec.block_bytes(tp_size)
    try:
        if device.type == "cpu" and num_bytes >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            return _huge_zeros(num_bytes).view(dtype).view(shape)
        if dtype.itemsize == 1:  # 8-bit floats are storage: few of torch's operations know them
            return torch.zeros(shape, dtype=torch.uint8, device=device).view(dtype)
        return torch.zeros(shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError, OSError) as error:
        raise ConfigError(f"the KV cache of {num_blocks} blocks ({num_bytes:,} bytes) does not fit: {error}") from error


def _huge_zeros(num_bytes: int) -> torch.Tensor:
    """Map bytes in pages of 2 MiB where the kernel has them, each made when it is first written.

    A worker starts without waiting for memory that it may never use. And a process that dies gives its memory back
    before it closes its sockets: 2 GiB take 0.2 s in small pages, and for so long nobody can notice.
    """
    free = free_memory_bytes()
    if num_bytes > free:
        raise MemoryError(f"{free:,} bytes are free")
    area = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        area.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE_BYTES
    return whole[start : start + num_bytes]


def copy_blocks(pages: torch.Tensor, copies: Sequence[tuple[int, int]], num_full: int) -> None:
    """Copy blocks (all layers) from the first to the second of each pair; to `~block` what thin ones have: `num_full`
    pages, in the first places.
    """
    bytes_or_numbers = pages.view(torch.uint8) if pages.dtype.itemsize == 1 else pages
    if thin := [(source, ~target) for source, target in copies if target < 0]:
        rows, stride = bytes_or_numbers.view(-1, *pages.shape[2:]), pages.shape[1]
        places = [place * stride for place in range(num_full)]
        sources, targets = ([place + pair[end] for pair in thin for place in places] for end in (0, 1))
        rows[targets] = rows[sources]
    if whole := [pair for pair in copies if pair[1] >= 0]:
        bytes_or_numbers[:, [target for _, target in whole]] = bytes_or_numbers[:, [source for source, _ in whole]]


def _default_bytes(config: EngineConfig, device: torch.device) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free - (1 - config.gpu_memory_utilization) * total))
    return min(_CPU_BYTES, int(_CPU_SHARE * free_memory_bytes()))
