"""Predicates for simulations and tests say what holds in a router between any two events.

requests   admitted = running + finished + failed + aborted; a queued request is on no worker, any other on its own
attempts   no more failures than allowed, and none that ends workers lives
workers    what is bound to one belongs to a live request; where a request runs alone nothing else is
queue      its counts are those of its members
"""

from __future__ import annotations

from collections.abc import Iterator

from ..state.pools import Pools
from ..state.request import RequestStatus
from ..state.tracked_request import TrackedRequest
from .in_flight import InFlightRequests
from .isolation import Isolation


def breaches(in_flight: InFlightRequests, pools: Pools, isolation: Isolation) -> list[str]:
    """One line for each that is broken; empty: all is well."""
    found = [*_of_requests(in_flight), *_of_workers(in_flight, pools), *_of_claims(isolation)]
    for tracked in in_flight:
        found += _of_request(tracked, in_flight)
    return found


def _of_requests(in_flight: InFlightRequests) -> Iterator[str]:
    tally = in_flight.tally
    ended = tally.finished + tally.failed + tally.aborted
    if tally.admitted != len(in_flight) + ended:
        yield f"{tally.admitted} admitted, {len(in_flight)} live and {ended} ended: {tally}"
    queued = [tracked for tracked in in_flight if tracked.request.status is RequestStatus.QUEUED]
    members = list(in_flight.queue)
    if set(queued) != set(members) or len(members) != len(set(members)):
        yield f"{len(queued)} requests are queued, the queue has {len(members)}"
    if in_flight.queue.num_waiting < 0 or in_flight.queue.num_waiting > len(members):
        yield f"{in_flight.queue.num_waiting} of {len(members)} wait"


def _of_request(tracked: TrackedRequest, in_flight: InFlightRequests) -> Iterator[str]:
    request = tracked.request
    name = f"request {request.request_id}, {request.status.value}"
    if request.is_finished:
        yield f"{name}: it has ended and lives"
    attempt = tracked.attempt
    if (request.status is RequestStatus.QUEUED) != (attempt is None):
        yield f"{name}: decode worker {attempt and attempt.decode.worker_id}"
    if attempt is not None and request.request_id not in attempt.decode.loads:
        yield f"{name}: not bound to {attempt.decode.worker_id}"
    if in_flight.verdicts.has_no_attempt_left(tracked):
        yield f"{name}: {request.num_failures} attempts failed"
    if in_flight.verdicts.has_ended_workers(tracked):
        yield f"{name}: {len(tracked.strikes)} strikes"


def _of_workers(in_flight: InFlightRequests, pools: Pools) -> Iterator[str]:
    for worker in pools:
        for request_id in worker.loads:
            tracked = in_flight.get(request_id)
            if tracked is None or tracked.attempt is None or not tracked.attempt.has_part(worker):
                yield f"{worker.worker_id}: bound to {request_id}, which has nothing there"


def _of_claims(isolation: Isolation) -> Iterator[str]:
    for claim in isolation.claims:
        if claim.attempt_number is None or claim.is_finished:
            continue
        for worker in claim.workers:
            if others := worker.loads.keys() - {claim.tracked.request.request_id}:
                yield f"{worker.worker_id}: {claim.tracked.request.request_id} runs alone beside {sorted(others)}"
