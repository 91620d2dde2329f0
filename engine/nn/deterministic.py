"""The deterministic mode needs, beside kernels that keep one order, one torch thread and a name for its results.

    same prompt, same tokens so far  ->  the same next token and log-probabilities, to the bit

whatever else is computed, in whatever chunks, by however many threads, on whichever worker of the cluster. Native code
(`cpu/`) promises that for any number of threads of its own. Torch does not: it cuts sums and functions where its
threads meet, so what it calculates, it calculates alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use the calling thread alone."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def torch_results(dtype: torch.dtype, tp_size: int) -> str:
    """Name what torch's results depend on: equal names, equal results."""
    capability = torch.backends.cpu.get_cpu_capability()
    if torch.cpu._is_amx_tile_supported():  # oneDNN then multiplies in another order than with vectors alone
        capability += " AMX"
    return f"torch {torch.__version__} {capability} {str(dtype).removeprefix('torch.')} tp {tp_size}"
