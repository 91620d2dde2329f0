"""When a request that met failures is given up: sooner in a fleet that is well but for it."""

from __future__ import annotations

import pytest

from kvferry.router.dispatch.verdicts import MAX_EXTRA, STORM_S
from kvferry.router.state.failures import MAX_STRIKES
from kvferry.router.state.request import RequestStatus
from kvferry.wire.results import WorkerFailure
from kvferry.wire.tasks import LocalTask
from kvferry.wire.workers import Goodbye

from ..fleet import Fleet, config

DEATH_S = 0.05  # from a task's sending to the loss: enough for it to have begun
PATIENCE_S = 3.0  # until a retry begins that waits for a token


def lose_idle_workers(fleet: Fleet, number: int, *, says_goodbye: bool = False) -> None:
    """Of no request that is here."""
    for index in range(number):
        link = fleet.join(f"idle-{index}", incarnation=int(1000 * fleet.clock.now()))
        if says_goodbye:
            fleet.dispatcher.on_message(link, Goodbye())
        fleet.dispatcher.worker_left(link, "killed")


def num_workers_ended(fleet: Fleet) -> int:
    """Submit a request that ends every worker that computes it, and return how many it needs for its refusal."""
    stream = fleet.submit()
    for number in range(20):
        if stream.request.status is RequestStatus.FAILED:
            return number
        worker = fleet.join(f"d-{number}", incarnation=int(1000 * fleet.clock.now()))
        worker.take(LocalTask)
        fleet.clock.advance(DEATH_S)
        fleet.dispatcher.worker_left(worker, "killed")
        assert not fleet.dispatcher.breaches()
    raise AssertionError("it is never refused")


@pytest.mark.parametrize(
    ("num_others", "num_extra"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (6, MAX_EXTRA), (40, MAX_EXTRA)]
)
def test_a_fleet_that_loses_workers_anyway_proves_less(num_others: int, num_extra: int) -> None:
    fleet = Fleet(config(expect_prefill=False, max_attempts=9))
    lose_idle_workers(fleet, num_others)
    assert num_workers_ended(fleet) == MAX_STRIKES + num_extra
    assert fleet.observer.num_poisoned == 1


def test_what_was_lost_long_ago_proves_nothing() -> None:
    fleet = Fleet(config(expect_prefill=False))
    lose_idle_workers(fleet, 8)
    fleet.clock.advance(STORM_S + 1.0)
    assert num_workers_ended(fleet) == MAX_STRIKES


def test_workers_that_end_by_themselves_prove_nothing() -> None:
    fleet = Fleet(config(expect_prefill=False))
    lose_idle_workers(fleet, 8, says_goodbye=True)
    assert num_workers_ended(fleet) == MAX_STRIKES


def test_workers_that_come_back_prove_nothing() -> None:
    fleet = Fleet(config(expect_prefill=False))
    away = [fleet.join(f"idle-{index}") for index in range(8)]
    for link in away:
        fleet.dispatcher.worker_left(link, "heartbeat missed")
    returned = [fleet.join(link.worker_id) for link in away]
    for link in returned:
        fleet.dispatcher.on_message(link, Goodbye())
        fleet.dispatcher.worker_left(link, "drained")
    assert num_workers_ended(fleet) == MAX_STRIKES


def test_what_a_poison_has_ended_does_not_speak_for_its_likes() -> None:
    fleet = Fleet(config(expect_prefill=False))
    assert [num_workers_ended(fleet) for _ in range(5)] == [MAX_STRIKES] * 5
    assert fleet.observer.num_poisoned == 5


@pytest.mark.parametrize(("num_others", "num_attempts"), [(0, 5), (2, 6), (40, 5 + MAX_EXTRA)])
def test_a_request_may_fail_more_often_where_workers_are_lost(num_others: int, num_attempts: int) -> None:
    fleet = Fleet(config(expect_prefill=False))
    lose_idle_workers(fleet, num_others)
    stream = fleet.submit()
    for number in range(20):
        if stream.request.status is RequestStatus.FAILED:
            break
        worker = fleet.join(f"d-{number}")
        fleet.wait(PATIENCE_S, worker)
        spec = worker.take(LocalTask).spec
        failure = WorkerFailure(request_id=spec.request_id, attempt=spec.attempt, reason="out of memory")
        fleet.dispatcher.on_message(worker, failure)
        fleet.dispatcher.on_message(worker, Goodbye())
        fleet.dispatcher.worker_left(worker, "drained")
    assert number == stream.request.num_failures == num_attempts


def test_what_a_request_was_forgiven_in_a_storm_stays_so() -> None:
    fleet = Fleet(config(expect_prefill=False, max_attempts=2))
    lose_idle_workers(fleet, 2)
    worker = fleet.join("d-0")
    stream = fleet.submit()
    for attempt in range(2):
        failure = WorkerFailure(request_id=stream.request.request_id, attempt=attempt, reason="out of memory")
        fleet.dispatcher.on_message(worker, failure)
        fleet.wait(PATIENCE_S, worker, num_running=1)
    fleet.clock.advance(STORM_S + 1.0)
    fleet.dispatcher.on_message(worker, Goodbye())
    fleet.dispatcher.worker_left(worker, "drained")
    assert (stream.request.status, stream.request.num_failures) == (RequestStatus.QUEUED, 2)
