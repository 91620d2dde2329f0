"""The two rates that floors are counted from, measured here and now: matrix products and reading memory.

CPU: products of square matrices in the engine's type, or in float32 where that is faster, as on a processor without
products of bfloat16, and sums over a buffer many times the cache, all with as many threads as the engine uses. CUDA: an
8192-cubed product of random numbers, and a copy on the device, whose bytes count twice, as they are read and written.
The best of several passes counts: a rate is what the machine can do, and whatever else runs on it only takes away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.benchmarks.shared.floors import Rates

if TYPE_CHECKING:
    import torch

_CPU_SIZES = (1024, 2048, 4096)
_CUDA_SIZE = 8192
_CUDA_COPY_BYTES = 4 << 30
_MIN_BUFFER_BYTES = 512 << 20
_CACHES = 8  # a buffer of so many caches: what is left from the pass before is lost in it
_PASSES = 5
_CUDA_PASSES = 20
_CUDA_ROW = 5  # one pass alone can be lucky with its clock


@dataclass(slots=True, frozen=True)
class MeasuredRates(Rates):
    """The rates and how they came about."""

    matmul: str  # "2048^3 in bfloat16"
    read: str  # "float32 sum over 512 MiB"


def best_of(measured: Iterable[MeasuredRates]) -> MeasuredRates:
    """The best of each kind: of several measurements in one run, those that were disturbed least."""
    every = list(measured)
    matmul = max(every, key=lambda one: one.matmul_flops_per_s)
    read = max(every, key=lambda one: one.read_bytes_per_s)
    return MeasuredRates(matmul.matmul_flops_per_s, read.read_bytes_per_s, matmul.matmul, read.read)


def measure_rates(device: torch.device, dtype: torch.dtype) -> MeasuredRates:
    """Some seconds. On a CPU with as many threads as torch has now."""
    import torch

    with torch.inference_mode():
        return _cuda_rates(device, dtype) if device.type == "cuda" else _cpu_rates(dtype)


def _cpu_rates(dtype: torch.dtype) -> MeasuredRates:
    import torch

    smallest, *larger = _CPU_SIZES
    by_kind = {kind: _cpu_matmul(smallest, kind) for kind in {dtype, torch.float32}}
    kind = max(by_kind, key=by_kind.__getitem__)
    name = str(kind).removeprefix("torch.")
    products = {f"{smallest}^3 in {name}": by_kind[kind]}
    products |= {f"{size}^3 in {name}": _cpu_matmul(size, kind) for size in larger}
    buffer_bytes = max(_MIN_BUFFER_BYTES, _CACHES * last_level_cache_bytes())
    buffer = torch.ones(buffer_bytes // 8, dtype=torch.int64)
    size = f"over {buffer_bytes >> 20} MiB"
    as_float = buffer.view(torch.float32)
    reads = {
        f"float32 sum {size}": buffer_bytes / _best_s(lambda: as_float.sum()),
        f"int64 sum {size}": buffer_bytes / _best_s(lambda: buffer.sum()),
        f"int64 maximum {size}": buffer_bytes / _best_s(lambda: buffer.max()),
    }
    matmul, read = max(products, key=lambda key: products[key]), max(reads, key=lambda key: reads[key])
    return MeasuredRates(products[matmul], reads[read], matmul, read)


def _cpu_matmul(size: int, dtype: torch.dtype) -> float:
    import torch

    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype).t()
    return 2.0 * size**3 / _best_s(lambda: a @ b)


def _cuda_rates(device: torch.device, dtype: torch.dtype) -> MeasuredRates:
    import torch

    rates = MeasuredRates(
        _cuda_matmul(device, dtype),
        _cuda_copy(device),
        f"{_CUDA_SIZE}^3 in {str(dtype).removeprefix('torch.')}",
        f"copy of {_CUDA_COPY_BYTES >> 30} GiB, counted twice",
    )
    torch.cuda.empty_cache()  # gives back what both have used
    return rates


def _cuda_matmul(device: torch.device, dtype: torch.dtype) -> float:
    import torch

    a, b = (torch.randn(_CUDA_SIZE, _CUDA_SIZE, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * _CUDA_SIZE**3 / _best_cuda_s(lambda: torch.mm(a, b, out=out))


def _cuda_copy(device: torch.device) -> float:
    import torch

    source = torch.ones(_CUDA_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * _CUDA_COPY_BYTES / _best_cuda_s(lambda: target.copy_(source))


def _best_s(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(_PASSES):
        began_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - began_s)
    return min(times)


def _best_cuda_s(run: Callable[[], object]) -> float:
    """Between events on the device, with several runs in a row: the host's part of a launch hides behind the last."""
    import torch

    for _ in range(3):
        run()
    best_ms = float("inf")
    for _ in range(_CUDA_PASSES // _CUDA_ROW):
        begin, end = _event(), _event()
        begin.record()
        for _ in range(_CUDA_ROW):
            run()
        end.record()
        torch.cuda.synchronize()
        best_ms = min(best_ms, float(begin.elapsed_time(end)) / _CUDA_ROW)
    return best_ms / 1e3


def _event() -> torch.cuda.Event:
    import torch

    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch
    return event


def last_level_cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """0 where the kernel does not tell."""
    sizes = [(entry / "size").read_text().strip() for entry in root.glob("index*") if (entry / "size").is_file()]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)
