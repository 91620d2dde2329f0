"""Background requests leave their workers when somebody comes who waits, and go on from their tokens afterwards."""

from __future__ import annotations

import random

import pytest

from kvferry.common.errors import CapacityError
from kvferry.common.request import unpack_ids
from kvferry.router.dispatch.background import QUIET_S
from kvferry.router.dispatch.deadlines import WORKER_WAIT_S
from kvferry.router.state.request import RequestStatus
from kvferry.router.state.token_stream import TokenStream
from kvferry.wire.tasks import Abort, LocalTask, PrefillTask, ReserveKV

from ..fleet import Fleet, Link, config, text, token, tokens


def state(stream: TokenStream) -> RequestStatus:
    return stream.request.status


def test_a_background_request_makes_way_and_goes_on_from_its_tokens() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    batch, task = fleet.decode(p, d, is_background=True)
    fleet.step(d, task, tokens(0, 1, 2))
    assert text(batch) == [0, 1, 2]
    other = fleet.submit()
    assert state(batch) is RequestStatus.QUEUED and state(other) is RequestStatus.RESERVED
    assert d.take(Abort).request_id == batch.request.request_id  # before the other's reservation
    fleet.step(d, task, tokens(0, 3, 1))  # it was on its way
    assert text(batch) == [] and fleet.observer.dropped["stale_attempt"] == 1
    fleet.grant(d)
    own = p.take(PrefillTask)
    fleet.first_token(p, own)
    fleet.arrived(d, own)
    fleet.wait(2 * QUIET_S, p, d)
    assert state(batch) is RequestStatus.QUEUED and not d.sent  # as long as somebody is served
    fleet.step(d, own, tokens(0, 1, 7, "length"))
    fleet.wait(QUIET_S / 2, p, d)
    assert state(batch) is RequestStatus.QUEUED
    fleet.wait(QUIET_S, p, d)
    again = fleet.grant(d)
    assert again.spec.attempt == 1
    assert [list(unpack_ids(output)) for output in again.spec.outputs] == [[token(0, n).token_id for n in range(3)]]
    resumed = p.take(PrefillTask)
    fleet.arrived(d, resumed)
    fleet.step(d, resumed, tokens(0, 3, 5, "length"))
    assert text(batch) == [3, 4, 5, 6, 7] and state(batch) is RequestStatus.FINISHED
    assert batch.request.num_failures == 0 and not fleet.observer.retries and not fleet.observer.resumed
    assert fleet.dispatcher.breaches() == []


def test_one_that_has_not_begun_waits_in_the_queue() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    fleet.submit()
    batch = fleet.submit(is_background=True)
    fleet.wait(1.0, p, d)
    assert state(batch) is RequestStatus.QUEUED and fleet.dispatcher.view().num_queued == 1
    assert [type(message) for message in d.sent] == [ReserveKV]


def test_suspended_ones_fill_no_queue() -> None:
    fleet = Fleet(config(max_queue=2))
    fleet.join("p-0"), fleet.join("d-0", max_num_seqs=1)
    batches = [fleet.submit(is_background=True) for _ in range(4)]
    others = [fleet.submit() for _ in range(3)]  # one is placed, two wait
    assert [state(other) for other in others] == [RequestStatus.RESERVED, RequestStatus.QUEUED, RequestStatus.QUEUED]
    with pytest.raises(CapacityError, match="2 requests wait, the queue holds 2"):
        fleet.submit()
    batches.append(fleet.submit(is_background=True))
    assert {state(batch) for batch in batches} == {RequestStatus.QUEUED}
    assert fleet.dispatcher.view().num_queued == 7 and fleet.dispatcher.breaches() == []


def test_as_many_as_may_run_beside_others_the_oldest_first() -> None:
    fleet = Fleet(config(batch_requests_beside=2))
    p, d = fleet.join("p-0"), fleet.join("d-0")
    batches = [fleet.submit(is_background=True) for _ in range(4)]
    assert [state(batch) for batch in batches] == [RequestStatus.RESERVED] * 4
    fleet.submit()
    assert [state(batch) is RequestStatus.QUEUED for batch in batches] == [False, False, True, True]
    batches[0].abort()
    fleet.wait(0.1, p, d)
    assert [state(batch) is RequestStatus.QUEUED for batch in batches] == [False, False, False, True]


def test_one_whose_client_leaves_while_it_is_suspended_is_gone() -> None:
    fleet = Fleet()
    fleet.join("p-0"), fleet.join("d-0")
    batch = fleet.submit(is_background=True)
    fleet.submit()
    batch.abort()
    assert state(batch) is RequestStatus.ABORTED
    assert fleet.dispatcher.breaches() == []


def test_a_suspect_that_makes_way_keeps_no_worker_from_others() -> None:
    fleet = Fleet(config(expect_prefill=False))
    busy = fleet.join("d-0", max_num_seqs=1)
    beside = fleet.submit(is_background=True)
    busy.take(LocalTask)
    for worker_id in ("d-a", "d-b"):
        d = fleet.join(worker_id)
        if worker_id == "d-a":
            suspect = fleet.submit(is_background=True)
        d.take(LocalTask)
        fleet.clock.advance(0.05)
        fleet.beat(busy, num_running=1, steps=int(fleet.clock.now() * 100))
        fleet.dispatcher.worker_left(d, "killed")
    tracked = fleet.dispatcher._in_flight.get(suspect.request.request_id)
    assert tracked is not None and tracked.must_run_alone and state(suspect) is RequestStatus.QUEUED
    other = fleet.submit()  # the worker was being emptied for the suspect
    assert state(beside) is state(suspect) is RequestStatus.QUEUED
    fleet.wait(0.2, busy)
    assert state(other) is RequestStatus.PREFILLING
    other.abort()
    fleet.wait(QUIET_S + 0.5, busy)
    assert RequestStatus.PREFILLING in (state(beside), state(suspect)) and not fleet.dispatcher.breaches()


def test_one_that_is_suspended_is_not_given_up_for_a_worker_that_it_lacked_before() -> None:
    fleet = Fleet(config(expect_prefill=False))
    small, large = fleet.join("d-0", num_blocks=2), fleet.join("d-1")
    batch = fleet.submit(100, is_background=True)
    fleet.step(large, large.take(LocalTask), tokens(0, 0, 2))
    fleet.dispatcher.worker_left(large, "killed")
    fleet.wait(0.5, small)  # which cannot hold it
    fleet.submit(4)
    large = fleet.join("d-1")
    for _ in range(round(WORKER_WAIT_S) + 1):
        fleet.wait(1.0, small, large, num_running=1, steps=int(fleet.clock.now() * 10))
    assert state(batch) is RequestStatus.QUEUED


@pytest.mark.slow
def test_whatever_comes_in_whatever_order_nothing_is_lost() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        fleet = Fleet(config(batch_requests_beside=rng.randrange(3)))
        p, d = fleet.join("p-0"), fleet.join("d-0")
        streams: list[TokenStream] = []
        for _ in range(60):
            match rng.randrange(5):
                case 0 | 1:
                    streams.append(fleet.submit(is_background=rng.random() < 0.7))
                case 2:
                    fleet.wait(rng.choice((0.1, 0.6)), p, d)
                case 3 if streams:
                    rng.choice(streams).abort()
                case _:
                    _answer_one(fleet, p, d)
            assert fleet.dispatcher.breaches() == []
        for stream in streams:
            if not stream.request.is_background:
                stream.abort()
        fleet.wait(QUIET_S + 0.5, p, d)
        waiting = [stream for stream in streams if state(stream) is RequestStatus.QUEUED]
        assert len(waiting) <= max(0, len(streams) - 1)
        assert all(not fleet.dispatcher._in_flight.get(each.request.request_id).is_suspended for each in waiting)  # type: ignore[union-attr]


def _answer_one(fleet: Fleet, p: Link, d: Link) -> None:
    """The workers take the next messages, and answer what they can."""
    while d.sent and not isinstance(d.sent[0], ReserveKV):
        d.sent.pop(0)
    if d.sent:
        fleet.grant(d)
    while p.sent and not isinstance(p.sent[0], PrefillTask):
        p.sent.pop(0)
    if p.sent:
        task = p.take(PrefillTask)
        fleet.first_token(p, task)
        fleet.arrived(d, task)
