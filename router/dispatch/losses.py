"""A worker is gone: what becomes of the requests that it had, and whose fault its end may be.

    decode worker lost     its requests go on elsewhere, from their accepted tokens
    prefill worker lost    the decode worker is asked whether the KV has arrived: it alone knows
    it had said goodbye    the same, and nobody failed: it ended by itself, when it had drained or was told to

A request that was in the worker's running step gets a strike (`running_steps.py`).
"""

from __future__ import annotations

import structlog

from ..state.attempt import Attempt
from ..state.failures import DRAINED, ROUTER_STOPS, WORKER_LOST, Blame, WorkerLife
from ..state.worker import RouterWorker
from .in_flight import InFlightRequests
from .running_steps import was_computing

log = structlog.get_logger(__name__)


class Losses:
    """`Losses` carries out what a loss means for the requests in flight."""

    def __init__(self, in_flight: InFlightRequests) -> None:
        self._in_flight = in_flight

    def on_left(self, worker: RouterWorker, reason: str, now_s: float) -> None:
        what = f"{worker.role} worker {worker.worker_id} lost: {reason}"
        tell = log.debug if reason == ROUTER_STOPS else log.info if worker.has_said_goodbye else log.warning
        tell("worker_lost", worker_id=worker.worker_id, role=worker.role, reason=reason)
        if not worker.has_said_goodbye:
            self._in_flight.verdicts.note_loss(worker.life, now_s)
        self._in_flight.explain(worker)
        # All blames before the first consequence, which would change what the worker is known to have had.
        blames = {
            tracked: (attempt, _blame(attempt, worker, what, now_s))
            for tracked in self._in_flight
            if (attempt := tracked.attempt) is not None and attempt.has_part(worker)
        }
        for tracked, (attempt, blame) in blames.items():
            tracked.lost_with.add(worker.life)
            if attempt.decode is worker:
                self._in_flight.retry(tracked, blame)
            elif attempt.is_prefilling_remotely:
                attempt.lost_prefill = blame
                attempt.ask_if_arrived(now_s)

    def on_returned(self, life: WorkerLife) -> None:
        """Take back the strikes of a process that is back: it was away, not dead, and no request had ended it."""
        self._in_flight.verdicts.note_return(life)
        for tracked in self._in_flight:
            tracked.strikes.discard(life)
            attempt = tracked.attempt
            if attempt is not None and attempt.lost_prefill is not None and attempt.lost_prefill.strike == life:
                attempt.lost_prefill = attempt.lost_prefill._replace(strike=None)


def _blame(attempt: Attempt, worker: RouterWorker, what: str, now_s: float) -> Blame:
    if worker.has_said_goodbye:
        return Blame(DRAINED, what, is_counted=False)
    return Blame(WORKER_LOST, what, strike=worker.life if was_computing(attempt, worker, now_s) else None)
