"""A worker is gone: what becomes of the requests that it had, and whose fault its end may be.

    decode worker lost     its requests go on elsewhere, from their accepted tokens
    prefill worker lost    the decode worker is asked whether the KV has arrived: it alone knows
    it had said goodbye    the same, and nobody failed: it ended by itself, when it had drained or was told to

A request that was in the worker's running step gets a strike. That step ran on another machine: what is known of it
are the tokens of the last steps and the order of the prompts. Queued, reserved, arrived and waiting for the batch, or
on its way between workers: none of these can have ended a worker.
"""

from __future__ import annotations

import structlog

from ..state.attempt import Attempt, AttemptState
from ..state.failures import DRAINED, ROUTER_STOPS, WORKER_LOST, Blame, WorkerLife
from ..state.request import RequestStatus
from ..state.worker import HEARTBEAT_LIMIT_S, RouterWorker
from .in_flight import InFlightRequests

_TRANSIT_S = 0.002  # a task sent so shortly before the end was never read

log = structlog.get_logger(__name__)


class Losses:
    """`Losses` carries out what a loss means for the requests in flight."""

    def __init__(self, in_flight: InFlightRequests) -> None:
        self._in_flight = in_flight

    def on_left(self, worker: RouterWorker, reason: str, now_s: float) -> None:
        what = f"{worker.role} worker {worker.worker_id} lost: {reason}"
        tell = log.debug if reason == ROUTER_STOPS else log.info if worker.has_said_goodbye else log.warning
        tell("worker_lost", worker_id=worker.worker_id, role=worker.role, reason=reason)
        self._in_flight.explain(worker)
        # All blames before the first consequence, which would change what the worker is known to have had.
        blames = {
            tracked: (attempt, _blame(attempt, worker, what, now_s))
            for tracked in self._in_flight
            if (attempt := tracked.attempt) is not None and attempt.has_part(worker)
        }
        for tracked, (attempt, blame) in blames.items():
            if attempt.decode is worker:
                self._in_flight.retry(tracked, blame)
            elif attempt.is_prefilling_remotely:
                attempt.lost_prefill = blame
                attempt.ask_if_arrived(now_s)

    def on_returned(self, life: WorkerLife) -> None:
        """Take back the strikes of a process that is back: it was away, not dead, and no request had ended it."""
        for tracked in self._in_flight:
            tracked.strikes.discard(life)
            attempt = tracked.attempt
            if attempt is not None and attempt.lost_prefill is not None and attempt.lost_prefill.strike == life:
                attempt.lost_prefill = attempt.lost_prefill._replace(strike=None)


def _blame(attempt: Attempt, worker: RouterWorker, what: str, now_s: float) -> Blame:
    if worker.has_said_goodbye:
        return Blame(DRAINED, what, is_counted=False)
    return Blame(WORKER_LOST, what, strike=worker.life if was_computing(attempt, worker, now_s) else None)


def was_computing(attempt: Attempt, worker: RouterWorker, now_s: float) -> bool:
    """Return whether the step that `worker` ran at its end had a row of this request."""
    end_s = now_s
    if worker.silent_s(now_s) > HEARTBEAT_LIMIT_S:
        end_s -= worker.silent_s(now_s)  # it stood still from there on
    if (
        attempt.request.status not in (RequestStatus.PREFILLING, RequestStatus.DECODING)
        or attempt.task_s > end_s - _TRANSIT_S
    ):
        return False
    if worker is attempt.prefill:
        return attempt.state < AttemptState.COMPUTED and worker.computes_prompt_of(attempt.request.request_id)
    if attempt.request.status is RequestStatus.PREFILLING:
        return attempt.prefill is None and worker.computes_prompt_of(attempt.request.request_id)
    if attempt.state is AttemptState.STEPPED:
        return worker.decodes(attempt.request.request_id)
    return _has_joined(attempt, worker)


def _has_joined(attempt: Attempt, worker: RouterWorker) -> bool:
    """Return whether a request whose KV has arrived, and of which no token came, has joined the batch.

    It joins when the step that runs at its arrival is over, and not before the worker's word of the arrival has left
    it. A resumed one then feeds what was accepted before, which yields no tokens; of any other the first message may
    be lost with the worker.
    """
    if attempt.arrived_s is None:
        return False
    if worker.status is not None and worker.status.num_running >= worker.hello.max_num_seqs:
        return False
    return worker.stepped_s > attempt.arrived_s or worker.has_only(attempt.request.request_id)
