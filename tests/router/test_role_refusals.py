"""A worker that has just changed its role refuses what it was asked for: nobody failed, its role is known at once."""

from __future__ import annotations

from kvferry.router.dispatch.deadlines import WORKER_WAIT_S
from kvferry.router.state.request import RequestStatus
from kvferry.wire.results import TaskRefused
from kvferry.wire.tasks import LocalTask, PrefillTask, ReserveKV

from .fleet import Fleet, Link, config


def refuse(fleet: Fleet, worker: Link, task: PrefillTask | LocalTask) -> None:
    message = TaskRefused(request_id=task.spec.request_id, attempt=task.spec.attempt, reason="wrong_role")
    fleet.dispatcher.on_message(worker, message)


def role_of(fleet: Fleet, worker_id: str) -> str:
    return next(worker.role for worker in fleet.dispatcher.view().workers if worker.worker_id == worker_id)


def test_a_reservation_goes_to_another_decode_worker_in_the_same_attempt() -> None:
    fleet = Fleet()
    fleet.join("p-0")
    first = fleet.join("d-0", can_change_role=True)
    stream = fleet.submit()
    second = fleet.join("d-1", can_change_role=True)
    fleet.refuse(first, "wrong_role")
    assert role_of(fleet, "d-0") == "prefill"
    ask = second.take(ReserveKV)
    assert (ask.spec.attempt, stream.request.num_failures) == (0, 0)


def test_a_grant_goes_to_another_prefill_worker() -> None:
    fleet = Fleet()
    decode, first = fleet.join("d-0"), fleet.join("p-0", can_change_role=True)
    stream = fleet.submit()
    second = fleet.join("p-1")
    fleet.grant(decode)
    refuse(fleet, first, first.take(PrefillTask))
    assert role_of(fleet, "p-0") == "decode"
    assert second.take(PrefillTask).grant.grant_id.worker_id == "d-0"
    assert stream.request.num_failures == 0


def test_without_another_worker_it_waits_uncharged_until_a_heartbeat_offers_the_role_again() -> None:
    fleet = Fleet(config(expect_prefill=False))
    decode = fleet.join("d-0", can_change_role=True)
    stream = fleet.submit()
    for _ in range(100):  # more often than attempts may fail, and than the retry budget holds
        refuse(fleet, decode, decode.take(LocalTask))
        decode.sent.clear()  # the Abort of the attempt
        assert stream.request.status is RequestStatus.QUEUED and not decode.sent
        fleet.clock.advance(0.1)
        fleet.beat(decode, role="decode")
    assert stream.request.num_failures == 0
    assert fleet.observer.num_exhausted == 0
    assert decode.take(LocalTask).spec.attempt == 100


def test_a_worker_that_cannot_change_its_role_is_not_asked_again_for_this_request() -> None:
    fleet = Fleet(config(expect_prefill=False))
    decode = fleet.join("d-0")
    stream = fleet.submit()
    refuse(fleet, decode, decode.take(LocalTask))
    assert role_of(fleet, "d-0") == "decode"
    assert stream.request.status is not RequestStatus.PREFILLING


def test_a_grant_is_not_used_by_the_worker_that_gave_it() -> None:
    fleet = Fleet()
    decode, first = fleet.join("d-0", can_change_role=True), fleet.join("p-0", can_change_role=True)
    stream = fleet.submit()
    fleet.grant(decode)
    fleet.beat(decode, role="prefill")
    refuse(fleet, first, first.take(PrefillTask))
    assert not any(isinstance(message, PrefillTask) for message in decode.sent)
    assert stream.request.num_failures == 0 and not stream.request.is_finished


def test_a_refusal_that_crossed_the_heartbeat_does_not_outlast_the_role() -> None:
    fleet = Fleet(config(expect_prefill=False))
    decode = fleet.join("d-0", can_change_role=True)
    stream = fleet.submit()
    task = decode.take(LocalTask)
    fleet.beat(decode, role="prefill")
    refuse(fleet, decode, task)
    decode.sent.clear()  # the Abort of the attempt
    fleet.beat(decode, role="decode")
    assert decode.take(LocalTask).spec.attempt == 1
    assert stream.request.num_failures == 0


def test_a_request_that_one_worker_can_hold_waits_for_such_a_worker() -> None:
    fleet = Fleet(config(expect_prefill=False))
    large = fleet.join("d-0", num_blocks=100, can_change_role=True)
    stream = fleet.submit(200)
    small = fleet.join("d-1", num_blocks=8)
    refuse(fleet, large, large.take(LocalTask))
    large.sent.clear()  # the Abort of the attempt
    for _ in range(round(WORKER_WAIT_S) - 1):
        fleet.beat(large, role="prefill")
        fleet.wait(1.0, small)
    assert stream.request.status is RequestStatus.QUEUED
    fleet.beat(large, role="decode")
    assert large.take(LocalTask).spec.attempt == 1


def test_a_request_that_no_worker_can_hold_any_more_ends() -> None:
    fleet = Fleet(config(expect_prefill=False))
    large = fleet.join("d-0", num_blocks=100)
    stream = fleet.submit(200)
    small = fleet.join("d-1", num_blocks=8)
    fleet.dispatcher.worker_left(large, "connection ended")
    fleet.wait(WORKER_WAIT_S + 2, small)
    assert stream.request.status is RequestStatus.FAILED
    assert stream._error is not None and stream._error.code == "no_decode_capacity"
