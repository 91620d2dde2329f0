"""A line's answer is judged: it stays, or the line is asked again.

    answered, refused, or it ends workers            final
    the server failed it                             asked again, a few times
    nothing had room for it, or the router leaves    asked again until the window is over
    its model is not here                            left to a router that has it, or to a later one

An error is judged by its code: a 503 may be a fleet without room, or a line with which one worker after the other was
lost. One that is not known here has failed the line.
"""

from __future__ import annotations

from enum import Enum

from ..state.errors import STORAGE_UNAVAILABLE
from .call import CallAnswer

MODEL_NOT_FOUND = "model_not_found"
# It has lost as many workers as prove it, within one ask: the next ask would lose as many.
_POISON = "poison_request"
# Codes of 503 that say nothing of the line. Every 429 is of this kind.
_NO_ROOM = frozenset(
    {
        "overloaded",
        "deadline_exceeded",  # in the queue; a line that ran out of its time has 504
        "no_decode_capacity",
        "no_prefill_capacity",
        "retry_budget_exhausted",  # of all requests together, and it fills again with time
        "router_stopping",
        "shutting_down",
        STORAGE_UNAVAILABLE,
    }
)


class Verdict(Enum):
    FINAL = "final"
    FAILED = "failed"
    NO_ROOM = "no room"
    NO_MODEL = "no model"


def verdict_on(answer: CallAnswer) -> Verdict:
    """Return what is to be done with a line that was answered so."""
    if answer.status == 404 and answer.code == MODEL_NOT_FOUND:
        return Verdict.NO_MODEL
    if answer.status == 429 or (answer.status == 503 and answer.code in _NO_ROOM):
        return Verdict.NO_ROOM
    if answer.status < 500 or answer.code == _POISON:
        return Verdict.FINAL
    return Verdict.FAILED
