"""A request's outcome is held against its objectives: were they met, and which stage spent the time?

    queued ─ queue ─> placed ─ retry, reserve ─> task sent ─ prefill_wait, prefill, reply ─> first token
    first token ─ transfer ─> KV there ─ first_decode ─> second token ─ decode ─> last token

Every duration is measured inside one process: the router's stamps, or the prefill worker's own measure of its part.
What of that part remains is the way of two messages. On a decode worker that computes the prompt itself, its wait and
its computation are one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .decisions import Decision
from .request import RequestStatus, RouterRequest

FAILED = "failed"  # the stage of those that have no answer
TTFT_STAGES = ("queue", "retry", "reserve", "prefill_wait", "prefill", "reply")
TPOT_STAGES = ("transfer", "decode")


@dataclass(slots=True, frozen=True)
class ServiceOutcome:
    """The outcome of one request, as far as it has got."""

    request_class: str
    is_good: bool | None  # it got what it was to get; None: not known, or its client left
    missed_stage: str = ""  # that spent most of the time in excess
    ttft_s: float | None = None
    tpot_s: float | None = None
    ttft_limit_s: float | None = None
    tpot_limit_s: float | None = None
    predicted_ttft_s: float | None = None  # from its arrival, at its last placement before the first token
    predicted_tpot_s: float | None = None
    ttft_error: float | None = None  # actual / predicted, from that placement on
    tpot_error: float | None = None
    phases_s: Mapping[str, float] = field(default_factory=dict)


def judge(request: RouterRequest) -> ServiceOutcome:
    """Pure: from the request's stamps, its decisions and its objectives."""
    stamps, objectives = request.timestamps, request.objectives
    ttft_s, tpot_s = _between(stamps, "queued", "first_token"), _tpot_s(request)
    ttft_limit_s = objectives.ttft_limit_s(request.unloaded_s)
    phases = _phases(request)
    stage = _missed_stage(request, ttft_s, tpot_s, phases)
    placed = None if request.is_background else _placed(request)  # its waits are on purpose
    expected_s = placed.ttft_s if placed is not None else None
    predicted_tpot_s = placed.tpot_s if placed is not None else None
    actual_s = stamps["first_token"] - placed.at_s if placed is not None and "first_token" in stamps else None
    return ServiceOutcome(
        request_class=request.request_class,
        is_good=None if stage is None else not stage,
        missed_stage=stage or "",
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        ttft_limit_s=ttft_limit_s,
        tpot_limit_s=objectives.tpot_s,
        predicted_ttft_s=None if placed is None or expected_s is None else placed.at_s - stamps["queued"] + expected_s,
        predicted_tpot_s=predicted_tpot_s,
        ttft_error=_ratio(actual_s, expected_s),
        tpot_error=_ratio(tpot_s, predicted_tpot_s),
        phases_s=phases,
    )


def _missed_stage(
    request: RouterRequest, ttft_s: float | None, tpot_s: float | None, phases: Mapping[str, float]
) -> str | None:
    """Empty: both objectives were met. None: there is nothing to say."""
    if request.status is RequestStatus.FAILED:
        return FAILED
    if request.status is not RequestStatus.FINISHED:
        return None
    limit_s = request.objectives.ttft_limit_s(request.unloaded_s)
    if limit_s is not None and ttft_s is not None and ttft_s > limit_s:
        spent = {stage: phases.get(stage, 0.0) for stage in TTFT_STAGES}
        spent["prefill"] -= request.unloaded_s  # this much it had to take
        return max(spent, key=spent.__getitem__)
    limit_s = request.objectives.tpot_s
    if limit_s is None or tpot_s is None or tpot_s <= limit_s:
        return ""
    without_s = tpot_s - phases.get("transfer", 0.0) / _num_gaps(request)
    return "transfer" if without_s <= limit_s else "decode"


def _phases(request: RouterRequest) -> dict[str, float]:
    """Seconds of each phase that is over. Of the attempt that yielded the first token, but for "retry"."""
    stamps, phases = request.timestamps, dict[str, float]()
    before = [one for one in request.decisions if one.at_s <= stamps.get("first_token", one.at_s)]
    if before:
        first, last = before[0], before[-1]
        phases["queue"] = first.at_s - stamps["queued"]
        if last.at_s > first.at_s:
            phases["retry" if last.attempt > first.attempt else "reserve"] = last.at_s - first.at_s
        if "prefill_start" in stamps and last.prefill_worker is not None:
            phases["reserve"] = phases.get("reserve", 0.0) + max(0.0, stamps["prefill_start"] - last.at_s)
    computed_s = _between(stamps, "prefill_start", "first_token")
    if computed_s is not None:
        phases |= _split(computed_s, request.prefill_wait_s, request.prefill_s)
    transfer_s = _between(stamps, "first_token", "arrived")
    if transfer_s is not None and before and before[-1].prefill_worker is not None:
        phases["transfer"] = transfer_s
    first_decode_s = _between(stamps, "first_token", "first_decode")
    if first_decode_s is not None:
        phases["first_decode"] = max(0.0, first_decode_s - phases.get("transfer", 0.0))
    decode_s = _between(stamps, "first_token", "last_token")
    if decode_s is not None:
        phases["decode"] = decode_s
    return phases


def _split(computed_s: float, wait_s: float, prefill_s: float) -> dict[str, float]:
    if not prefill_s:  # the decode worker's, or it came with its first step
        return {"prefill": computed_s}
    reply_s = max(0.0, computed_s - wait_s - prefill_s)
    return {"prefill_wait": wait_s, "prefill": prefill_s, "reply": reply_s}


def _placed(request: RouterRequest) -> Decision | None:
    """The decision that the first token came from."""
    first_s = request.timestamps.get("first_token", float("inf"))
    return next((one for one in reversed(request.decisions) if one.at_s <= first_s), None)


def _tpot_s(request: RouterRequest) -> float | None:
    span_s, num_gaps = _between(request.timestamps, "first_token", "last_token"), _num_gaps(request)
    return span_s / num_gaps if span_s is not None and num_gaps > 0 else None


def _num_gaps(request: RouterRequest) -> int:
    """Return how many tokens followed the first one: of choices side by side, in the longest, which ends last."""
    return request.num_longest_tokens - 1


def _between(stamps: Mapping[str, float], begin: str, end: str) -> float | None:
    return max(0.0, stamps[end] - stamps[begin]) if begin in stamps and end in stamps else None


def _ratio(actual_s: float | None, predicted_s: float | None) -> float | None:
    return actual_s / predicted_s if actual_s is not None and predicted_s else None
