"""What may be tried again: the retry budget, pauses, and where a retry finds the prompt's KV."""

from __future__ import annotations

import random

import pytest

from kvferry.router.dispatch.retries import BURST, RetryBudget
from kvferry.router.state.errors import StreamError
from kvferry.router.state.failures import NOTICE_S
from kvferry.router.state.request import RequestStatus
from kvferry.router.state.token_stream import TokenStream
from kvferry.wire.results import WorkerFailure
from kvferry.wire.tasks import Abort, LocalTask, PrefillTask, ReserveKV

from .fleet import Fleet, Link, config, text, tokens


async def failure(stream: TokenStream) -> StreamError:
    assert stream.request.status is RequestStatus.FAILED
    with pytest.raises(StreamError) as info:
        async for _ in stream:
            pass
    return info.value


def fails(fleet: Fleet, worker: Link, stream: TokenStream) -> None:
    request = stream.request
    message = WorkerFailure(request_id=request.request_id, attempt=request.attempt_number, reason="out of memory")
    fleet.dispatcher.on_message(worker, message)


# --- the bucket ------------------------------------------------------------------------------------------------------


def budget() -> RetryBudget:
    return RetryBudget(random.Random(1))


def drained(at_s: float = 0.0) -> RetryBudget:
    bucket = budget()
    for _ in range(round(BURST)):
        assert bucket.charge(frozenset(), at_s).is_paid
    return bucket


def test_the_bucket_is_full_at_first_and_then_empty() -> None:
    assert not drained().charge(frozenset(), 0.0).is_paid


def test_a_tenth_of_what_is_admitted_may_be_tried_again() -> None:
    bucket = drained()
    for _ in range(1001):
        bucket.on_admitted()
    paid = [bucket.charge(frozenset(), 0.0).is_paid for _ in range(100)]
    assert sum(paid) == BURST  # never more at once
    for _ in range(25):
        bucket.on_admitted()
    assert [bucket.charge(frozenset(), 0.0).is_paid for _ in range(3)] == [True, True, False]


def test_a_quiet_router_may_retry_once_a_second() -> None:
    bucket = drained(100.0)
    assert not bucket.charge(frozenset(), 100.5).is_paid
    assert bucket.charge(frozenset(), 101.1).is_paid
    assert not bucket.charge(frozenset(), 101.2).is_paid


def test_a_charge_is_paid_later_or_taken_back() -> None:
    bucket = drained()
    charge = bucket.charge(frozenset({7}), 0.0)
    assert not charge.is_paid and not bucket.pay(charge, 0.5) and bucket.pay(charge, 1.5)
    assert charge.is_explained_by(7, NOTICE_S) and not charge.is_explained_by(8, 0.1)
    assert not charge.is_explained_by(7, NOTICE_S + 0.1)


def test_pauses_double_and_differ() -> None:
    bucket = budget()
    assert bucket.pause_s(1) == 0.0
    assert 0.025 <= bucket.pause_s(2) <= 0.075 and 0.05 <= bucket.pause_s(3) <= 0.15
    assert bucket.pause_s(50) <= 1.5 and bucket.pause_s(4) != bucket.pause_s(4)


# --- requests --------------------------------------------------------------------------------------------------------


def test_the_first_failure_of_a_kind_is_retried_at_once_and_the_next_after_a_pause() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d = fleet.join("d-0")
    stream = fleet.submit()
    d.take(LocalTask)
    fails(fleet, d, stream)
    d.take(Abort)
    assert d.take(LocalTask).spec.attempt == 1
    fails(fleet, d, stream)
    d.take(Abort)
    assert not d.sent and stream.request.status is RequestStatus.QUEUED
    fleet.wait(0.2, d)
    assert d.take(LocalTask).spec.attempt == 2


def test_a_failure_of_another_kind_is_retried_at_once() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d)
    fleet.failed(d, task, "peer")
    fails(fleet, d, stream)
    assert stream.request.attempt_number == 2 and stream.request.status is RequestStatus.PREFILLING


def test_tokens_between_two_failures_make_the_second_one_the_first_of_its_kind() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d = fleet.join("d-0")
    stream = fleet.submit()
    for index in range(3):
        fleet.step(d, d.take(LocalTask), tokens(0, index, 1))
        fails(fleet, d, stream)
        d.take(Abort)
    assert d.take(LocalTask).spec.attempt == 3


async def test_a_storm_of_errors_ends_in_refusals_not_in_more_work() -> None:
    fleet = Fleet(config(expect_prefill=False, max_attempts=100))
    d = fleet.join("d-0", num_blocks=4096, max_num_seqs=1000, max_num_batched_tokens=100_000)
    fleet.beat(d, num_free_blocks=4096)
    streams = [fleet.submit() for _ in range(100)]
    for stream in streams:
        fails(fleet, d, stream)
    retried = [stream for stream in streams if stream.request.status is not RequestStatus.QUEUED]
    assert len(retried) == int(BURST)  # what the hundred admitted gave came when the bucket was full
    fleet.wait(NOTICE_S + 0.2, d, num_running=1)
    lost = [stream for stream in streams if stream.request.status is RequestStatus.FAILED]
    assert len(lost) == fleet.observer.num_exhausted and 30 <= len(lost) <= 36  # one a second comes in
    error = await failure(lost[0])
    assert (error.code, error.status) == ("retry_budget_exhausted", 503)


def test_errors_that_a_death_explains_are_not_charged() -> None:
    fleet = Fleet(config(max_attempts=100))
    p0, d = fleet.join("p-0", max_num_batched_tokens=100_000), fleet.join("d-0", max_num_seqs=1000, num_blocks=4096)
    fleet.beat(d, num_free_blocks=4096)
    started = [fleet.start(p0, d) for _ in range(100)]
    fleet.clock.advance(0.1)
    for _, task in started:
        fleet.failed(d, task, "peer")  # the decode worker sees it first
    assert any(stream.request.status is RequestStatus.QUEUED for stream, _ in started)
    fleet.clock.advance(0.1)
    fleet.dispatcher.worker_left(p0, "killed")
    assert all(stream.request.status is not RequestStatus.FAILED for stream, _ in started)
    fleet.wait(2.0, d, num_running=1)
    assert fleet.observer.num_exhausted == 0 and not fleet.dispatcher.breaches()


def drain(fleet: Fleet) -> RetryBudget:
    bucket = fleet.dispatcher._in_flight._budget
    while bucket.charge(frozenset(), fleet.clock.now()).is_paid:
        pass
    return bucket


def test_a_charge_that_nobody_has_paid_gives_nothing_back() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d0, d1 = fleet.join("d-0"), fleet.join("d-1")
    first, second = fleet.submit(), fleet.submit()
    drain(fleet)
    fails(fleet, d0, first)
    fleet.dispatcher.worker_left(d0, "killed")
    assert first.request.status is RequestStatus.PREFILLING, "a death explains its failure"
    fails(fleet, d1, second)
    assert second.request.status is RequestStatus.QUEUED


def test_a_charge_is_given_back_though_the_next_attempt_has_ended_without_one() -> None:
    fleet = Fleet()
    p0, p1, d = fleet.join("p-0"), fleet.join("p-1"), fleet.join("d-0")
    first, task = fleet.start(p0, d)
    drain(fleet).give_back()
    fleet.failed(d, task, "peer")
    d.take(Abort)
    fleet.grant(d)
    fleet.failed(d, p1.take(PrefillTask), "fenced")  # nobody's fault
    assert first.request.attempt_number == 2 and first.request.num_failures == 1
    fleet.dispatcher.worker_left(p0, "killed")
    second = fleet.submit()
    fails(fleet, d, second)
    assert second.request.attempt_number == 1 and second.request.status is not RequestStatus.QUEUED


def test_a_pause_is_over_when_a_death_explains_the_failure() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d0 = fleet.join("d-0")
    stream = fleet.submit()
    for _ in range(2):
        fails(fleet, d0, stream)
    assert stream.request.status is RequestStatus.QUEUED
    fleet.dispatcher.worker_left(d0, "killed")
    assert fleet.join("d-1").take(LocalTask).spec.attempt == 2


def test_deaths_that_explain_a_requests_failures_are_not_the_fleets() -> None:
    fleet = Fleet(config(max_attempts=3, local_prefill=False))
    d = fleet.join("d-0")
    stream = fleet.submit()
    for number in range(3):
        p = fleet.join(f"p-{number}")
        fleet.grant(d)
        fleet.failed(d, p.take(PrefillTask), "peer")
        fleet.dispatcher.worker_left(p, "killed")
        d.sent.clear()
    assert stream.request.status is RequestStatus.FAILED


def test_losses_are_never_charged() -> None:
    fleet = Fleet(config(expect_prefill=False, max_attempts=100))
    streams = [fleet.submit() for _ in range(100)]
    for index in range(3):
        d = fleet.join(f"d-{index}", num_blocks=4096, max_num_seqs=1000, max_num_batched_tokens=100_000)
        fleet.beat(d, num_free_blocks=4096)
        fleet.dispatcher.worker_left(d, "killed")
    d = fleet.join("d-9", num_blocks=4096, max_num_seqs=1000, max_num_batched_tokens=100_000)
    fleet.beat(d, num_free_blocks=4096)
    assert all(stream.request.status is RequestStatus.PREFILLING for stream in streams)


# --- where the prompt's KV is ----------------------------------------------------------------------------------------


def test_a_failed_handoff_ships_again_from_the_worker_that_has_the_prompt() -> None:
    fleet = Fleet()
    p0, p1, d0, d1 = (fleet.join(name) for name in ("p-0", "p-1", "d-0", "d-1"))
    stream, task = fleet.start(p0, d0, num_prompt_tokens=60)
    fleet.first_token(p0, task)
    fleet.failed(d0, task, "link")
    p0.take(Abort)
    assert fleet.grant(d1).spec.attempt == 1
    again = p0.take(PrefillTask)
    assert again.spec.attempt == 1 and not p1.sent and stream.request.prefill_worker == "p-0"
    bound = next(worker for worker in fleet.dispatcher.view().workers if worker.worker_id == "p-0")
    assert bound.ahead_tokens == 16, "it computes next to nothing"
    fleet.arrived(d1, again)
    fleet.step(d1, again, tokens(0, 0, 2, "stop"))
    assert text(stream) == [0, 1]


def test_the_cache_outweighs_a_little_load() -> None:
    fleet = Fleet()
    p0, d0 = fleet.join("p-0"), fleet.join("d-0")
    _, task = fleet.start(p0, d0)
    fleet.first_token(p0, task)
    p1, d1 = fleet.join("p-1"), fleet.join("d-1")
    fleet.beat(p0, num_running=1, waiting_tokens=30)  # another router's
    fleet.failed(d0, task, "link")
    again = next(m for link in (d0, d1) for m in link.sent if isinstance(m, ReserveKV) and m.spec.attempt == 1)
    tracked = fleet.dispatcher._in_flight.get(again.spec.request_id)
    assert tracked is not None and tracked.attempt is not None and tracked.attempt.prefill is not None
    assert tracked.attempt.prefill.worker_id == "p-0"
    assert p1.worker_id != tracked.attempt.prefill.worker_id


def test_a_stream_whose_decode_worker_is_lost_resumes_from_the_prefill_workers_cache() -> None:
    fleet = Fleet()
    p0, d0 = fleet.join("p-0"), fleet.join("d-0")
    _, task = fleet.decode(p0, d0)
    fleet.step(d0, task, tokens(0, 0, 2))
    p1, d1 = fleet.join("p-1"), fleet.join("d-1")
    fleet.dispatcher.worker_left(d0, "killed")
    fleet.grant(d1)
    assert not p0.take(PrefillTask).sample and not p1.sent


def test_without_that_worker_any_will_do() -> None:
    fleet = Fleet()
    p0, d0 = fleet.join("p-0"), fleet.join("d-0")
    _, task = fleet.decode(p0, d0)
    fleet.step(d0, task, tokens(0, 0, 2))
    p1, d1 = fleet.join("p-1"), fleet.join("d-1")
    fleet.dispatcher.worker_left(p0, "killed")
    fleet.dispatcher.worker_left(d0, "killed")
    fleet.grant(d1)
    assert not p1.take(PrefillTask).sample


def test_a_grant_that_nobody_opened_says_nothing_of_a_cache() -> None:
    fleet = Fleet()
    p0, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p0, d)
    fleet.clock.advance(0.1)
    fleet.beat(p0, num_waiting=1, waiting_tokens=20)
    fleet.failed(d, task, "expired", peer="")
    tracked = fleet.dispatcher._in_flight.get(stream.request.request_id)
    assert tracked is not None and tracked.search.computed_on is None
