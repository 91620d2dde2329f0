"""Live requests are looked at when a limit of theirs is due, and not before."""

from __future__ import annotations

from kvferry.common.request import SamplingParams
from kvferry.router.dispatch.due_times import MOST_AT_ONCE, DueTimes
from kvferry.router.state.request import RequestStatus, RouterRequest
from kvferry.router.state.token_stream import TokenStream
from kvferry.router.state.tracked_request import TrackedRequest


def tracked(name: str = "r-0") -> TrackedRequest:
    request = RouterRequest(name, [1], SamplingParams())
    return TrackedRequest(request, TokenStream(request, lambda: None, lambda choice: None), None)


def test_the_earliest_look_counts_and_the_later_ones_are_dropped() -> None:
    due_times, one = DueTimes(), tracked()
    due_times.schedule(one, 5.0)
    due_times.schedule(one, 3.0)
    due_times.schedule(one, 4.0)
    assert due_times.due(2.9) == []
    assert due_times.due(3.0) == [one]
    assert due_times.due(10.0) == [] and len(due_times) == 0


def test_requests_come_up_in_the_order_of_their_due_times() -> None:
    due_times, first, second, third = DueTimes(), tracked("a"), tracked("b"), tracked("c")
    due_times.schedule(second, 2.0)
    due_times.schedule(third, 2.0)
    due_times.schedule(first, 1.0)
    assert due_times.due(2.0) == [first, second, third]


def test_a_request_that_has_ended_is_not_looked_at() -> None:
    due_times, one = DueTimes(), tracked()
    due_times.schedule(one, 1.0)
    one.request.advance(RequestStatus.ABORTED, 0.5)
    assert due_times.due(1.0) == []


def test_the_most_overdue_ones_come_first_where_there_are_too_many() -> None:
    due_times = DueTimes()
    for number in range(MOST_AT_ONCE + 5):
        due_times.schedule(tracked(f"r-{number}"), 100.0 - number / 1e6)
    first = due_times.due(200.0)
    assert len(first) == MOST_AT_ONCE and first[0].request.request_id == f"r-{MOST_AT_ONCE + 4}"
    assert [each.request.request_id for each in due_times.due(200.0)] == [f"r-{number}" for number in (4, 3, 2, 1, 0)]
