"""The predicates find what they are there to find."""

from __future__ import annotations

import pytest

from kvferry.router.dispatch.isolation import Claim
from kvferry.router.state.request import RequestStatus
from kvferry.router.state.token_stream import TokenStream
from kvferry.router.state.views import RequestLoad
from kvferry.wire.tasks import LocalTask

from ..fleet import Fleet, config, tokens


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(config(expect_prefill=False))


def running(fleet: Fleet) -> TokenStream:
    d = fleet.join("d-0")
    stream = fleet.submit()
    fleet.step(d, d.take(LocalTask), tokens(0, 0, 1))
    return stream


def found(fleet: Fleet) -> str:
    return "\n".join(fleet.dispatcher.breaches())


def test_nothing_is_found_where_all_is_well(fleet: Fleet) -> None:
    streams = [running(fleet), fleet.submit(), fleet.submit()]
    assert found(fleet) == ""
    for stream in streams:
        stream.abort()
    tally = fleet.dispatcher._in_flight.tally
    assert found(fleet) == "" and (tally.admitted, tally.aborted) == (3, 3)


def test_a_request_that_vanishes(fleet: Fleet) -> None:
    stream = running(fleet)
    del fleet.dispatcher._in_flight._tracked[stream.request.request_id]
    assert "1 admitted, 0 live and 0 ended" in found(fleet) and "which has nothing there" in found(fleet)


def test_a_request_that_ends_twice(fleet: Fleet) -> None:
    running(fleet)
    fleet.dispatcher._in_flight.tally.finished += 1
    assert "1 admitted, 1 live and 1 ended" in found(fleet)


def test_a_request_that_is_queued_and_in_no_queue(fleet: Fleet) -> None:
    stream = fleet.submit()
    tracked = fleet.dispatcher._in_flight.get(stream.request.request_id)
    assert tracked is not None
    fleet.dispatcher._in_flight.queue.remove(tracked)
    assert "1 requests are queued, the queue has 0" in found(fleet)


def test_a_load_that_is_never_released(fleet: Fleet) -> None:
    fleet.join("d-0")
    worker = fleet.dispatcher._pools.named("d-0")
    assert worker is not None
    worker.bind("ghost", RequestLoad(1, 1, 1))
    assert "bound to ghost" in found(fleet)


def test_company_where_a_request_should_be_alone(fleet: Fleet) -> None:
    stream = running(fleet)
    fleet.submit()
    tracked = fleet.dispatcher._in_flight.get(stream.request.request_id)
    assert tracked is not None and tracked.attempt is not None and stream.request.status is RequestStatus.DECODING
    tracked.strikes |= {("d-8", 1), ("d-9", 1)}
    fleet.dispatcher._isolation.claims.append(Claim(tracked, (tracked.attempt.decode,), 0.0, attempt_number=0))
    assert "runs alone beside ['r-1']" in found(fleet)


def test_a_third_strike_that_nobody_noticed(fleet: Fleet) -> None:
    stream = running(fleet)
    tracked = fleet.dispatcher._in_flight.get(stream.request.request_id)
    assert tracked is not None
    tracked.strikes |= {("a", 1), ("b", 1), ("c", 1)}
    assert "3 strikes" in found(fleet)
