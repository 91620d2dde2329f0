"""How long a GPU was busy while something ran, from the profiler's record of every kernel and copy.

Kernels that overlap count once. What the profiler costs the host does not matter: only times on the device are read,
and the wall time to hold against them comes from a run without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable


def busy_s(intervals_us: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals in microseconds, in seconds."""
    total, covered_to = 0.0, float("-inf")
    for start, end in sorted(intervals_us):
        total += max(0.0, end - max(start, covered_to))
        covered_to = max(covered_to, end)
    return total * 1e-6


def gpu_busy_s(run: Callable[[], object]) -> float | None:
    """Seconds for which any kernel or copy of this process ran; None where the profiler sees no device."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    intervals = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA"
    ]
    return busy_s(intervals) if intervals else None
