"""An answer's time is told by phases of its request, as durations, in the Server-Timing header and the log.

Every phase is a difference of two stamps of one clock (the API and the dispatcher share it).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..state.request import RouterRequest
from .middleware import RequestContext

# Phase -> the stamps between which it lies. A phase whose end is not stamped yet is not known yet.
_PHASES = {
    "queue": ("queued", "prefill_start"),
    "prefill": ("prefill_start", "first_token"),
    "transfer": ("first_token", "arrived"),  # what of it the first token did not cover
    "decode": ("first_token", "last_token"),
    "ttft": ("queued", "first_token"),
    "total": ("queued", "finished"),
}


def phases_ms(context: RequestContext, requests: Sequence[RouterRequest]) -> dict[str, float]:
    """Milliseconds of each phase that is known; of a batch of prompts, the slowest one's."""
    phases: dict[str, float] = {}
    previous_s = context.started_s
    for name, mark_s in context.marks.items():
        phases[f"{name}_ms"] = _ms(mark_s - previous_s)
        previous_s = mark_s
    for name, (begin, end) in _PHASES.items():
        durations = [
            request.timestamps[end] - request.timestamps[begin]
            for request in requests
            if begin in request.timestamps and end in request.timestamps
        ]
        if durations:
            phases[f"{name}_ms"] = _ms(max(durations))
    return phases


def server_timing(context: RequestContext, requests: Sequence[RouterRequest]) -> bytes:
    """The header's value, such as `tokenize;dur=0.8, queue;dur=1.2, prefill;dur=31.0`."""
    phases = phases_ms(context, requests).items()
    return ", ".join(f"{name.removesuffix('_ms')};dur={value}" for name, value in phases).encode()


def _ms(seconds: float) -> float:
    return round(max(seconds, 0.0) * 1000, 3)
