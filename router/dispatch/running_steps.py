"""Workers that were computing a request: it has a row in their running step, as far as a router can know.

That step runs on another machine: what is known of it are the tokens of the last steps and the order of the prompts.
Queued, reserved, arrived and waiting for the batch, or on its way between workers: a request in none of these can have
ended a worker.
"""

from __future__ import annotations

from ..state.attempt import Attempt, AttemptState
from ..state.failures import Suspicion
from ..state.request import RequestStatus
from ..state.worker import HEARTBEAT_LIMIT_S, RouterWorker

TRANSIT_S = 0.002  # a message sent so shortly before the end was never read


def was_computing(attempt: Attempt, worker: RouterWorker, now_s: float) -> bool:
    """Return whether the step that `worker` runs now, or ran at its end, had a row of this request."""
    end_s = now_s
    if worker.silent_s(now_s) > HEARTBEAT_LIMIT_S:
        end_s -= worker.silent_s(now_s)  # it stood still from there on
    if (
        attempt.request.status not in (RequestStatus.PREFILLING, RequestStatus.DECODING)
        or attempt.task_s > end_s - TRANSIT_S
    ):
        return False
    if worker is attempt.prefill:
        return attempt.state < AttemptState.COMPUTED and worker.computes_prompt_of(attempt.request.request_id)
    if attempt.request.status is RequestStatus.PREFILLING:
        return attempt.prefill is None and worker.computes_prompt_of(attempt.request.request_id)
    if attempt.state is AttemptState.STEPPED:
        return worker.decodes(attempt.request.request_id)
    return _has_joined(attempt, worker)


def suspicion_of(attempt: Attempt, now_s: float) -> Suspicion | None:
    """Return who was computing the request of an attempt that ends now; None: nobody."""
    for worker in attempt.workers:
        if was_computing(attempt, worker, now_s):
            return Suspicion(worker.life, now_s)
    return None


def may_have_ended(suspicion: Suspicion, worker: RouterWorker) -> bool:
    """Return whether the lost worker may have been in the step still in which the attempt's end met it."""
    return suspicion.life == worker.life and not worker.has_stepped_since(suspicion.at_s + TRANSIT_S)


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
