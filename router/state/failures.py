"""A failed attempt has a reason and costs the request something: one value, made by whoever sees the failure.

    counted   towards the request's attempts: something went wrong while it was tried
    charged   to the router's retry budget: a worker that lives reported an error, so a retry may meet it again
    a strike  it was in the running step of a worker when that worker was lost

                              counted   charged   strike
    worker lost                 yes       no      if in its running step
    worker said goodbye          no       no        no
    no room, draining            no       no        no
    anything else               yes      yes        no

A worker that is lost within NOTICE_S of an attempt that ended otherwise, in the same step still, is a strike as well.

Losses are bounded by the deaths themselves. After two strikes the next attempt runs alone on a worker
(`isolation.py`); a third one proves it, and the request is refused, unless the fleet loses workers without it as well
(`dispatch/verdicts.py`). An attempt that has given tokens in CLEARED_BY_STEPS messages is past the place where the
earlier workers were lost: their strikes were others' deaths, and are taken back. What ends a worker again and again
after so many steps meets the limit of attempts instead.

A request with a strike is a suspect. Who is lost with a suspect is not to blame, which its launcher is told: it is
started again without a pause. Suspects wait instead: where a worker comes back as the only one of its pool, the others
have OTHERS_FIRST_S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

WORKER_LOST = "worker_lost"
ROUTER_STOPS = "the router stops"  # why every session ends
DRAINED = "drained"

STRIKES_UNTIL_ALONE = 2
MAX_STRIKES = 3
CLEARED_BY_STEPS = 8  # fewer clear more innocents where workers die often, and let a slow poison end more workers
OTHERS_FIRST_S = 2.0  # the answers of most

WorkerLife = tuple[str, int]  # a worker's id and incarnation


class Blame(NamedTuple):
    """The reason why an attempt failed, for the retry's log line and for the client if there is no other."""

    reason: str  # metric label
    text: str  # names the peer
    is_counted: bool = True  # False: nobody failed, there was no room or the worker had said goodbye
    strike: WorkerLife | None = None  # the worker that was lost while it computed the request

    @property
    def is_charged(self) -> bool:
        return self.is_counted and self.reason != WORKER_LOST


class Suspicion(NamedTuple):
    """An attempt ended, for whatever reason, while a worker computed the request: that worker's loss may be its doing.

    The step that ran then goes on to its end, and a peer may have seen the worker's death before its router.
    """

    life: WorkerLife
    at_s: float


NOTICE_S = 1.5  # from an error to the loss that explains it; a hung peer's leases end about so long before its verdict


@dataclass(slots=True)
class Charge:
    """The cost of one retry."""

    sessions: frozenset[int]  # of the workers that took part in the failure
    at_s: float
    is_paid: bool

    def is_explained_by(self, session: int, now_s: float) -> bool:
        return session in self.sessions and now_s - self.at_s <= NOTICE_S
