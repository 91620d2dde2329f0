"""A router keeps what it decided about a request, for those who ask why: no worker, no policy and no prompt in it.

Decision    one attempt's placement: where, by which rule, what was expected of it
Candidate   one of the ways that were looked at; listed where the request is explained
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_DECISIONS = 16  # kept of one request: the first ones, and the latest


@dataclass(slots=True, frozen=True)
class Candidate:
    """A way to serve the request, or a worker that was none. Times are from the decision on."""

    prefill_worker: str | None  # None: the decode worker computes the prompt
    decode_worker: str | None  # None: a prefill worker that was rejected for all of them
    ttft_s: float | None = None  # predicted; None: the policy predicts nothing
    tpot_s: float | None = None
    wait_s: float | None = None  # for prompts ahead
    prefill_s: float | None = None
    transfer_s: float | None = None  # what of it the prefill does not hide
    cached_tokens: int = 0
    score: float | None = None  # the policy's; lower is better
    rejected: str = ""  # why it could not be taken; empty: it could


@dataclass(slots=True, frozen=True)
class Decision:
    """One placement."""

    attempt: int
    at_s: float  # the dispatcher's clock
    policy: str
    prefill_worker: str | None
    decode_worker: str | None  # None: the prefill worker embeds the prompt
    reason: str
    waited_for: str = ""  # what it lacked before; empty: it was placed at the first look
    ttft_s: float | None = None  # predicted, from the decision on
    tpot_s: float | None = None
    candidates: tuple[Candidate, ...] = ()


def note(decisions: list[Decision], decision: Decision) -> None:
    """Bounded: of a request that is placed again and again, the ones in between are forgotten."""
    if len(decisions) == MAX_DECISIONS:
        decisions[-1] = decision
    else:
        decisions.append(decision)
