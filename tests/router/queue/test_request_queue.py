"""The central queue's order: priority, what can still be met, shares, due times. Time is a number here."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvferry.common.request import SampledToken, SamplingParams
from kvferry.router.queue.arrival_load import ArrivalLoad
from kvferry.router.queue.priority_level import LATE_EVERY, PriorityLevel
from kvferry.router.queue.request_queue import RequestQueue, due_s
from kvferry.router.state.objectives import Objectives
from kvferry.router.state.request import RouterRequest
from kvferry.router.state.token_stream import TokenStream
from kvferry.router.state.tracked_request import TrackedRequest

_arrivals = count(1)


def tracked(
    at_s: float = 0.0,
    *,
    tenant: str = "",
    unloaded_s: float = 0.0,
    ttft_s: float | None = None,
    deadline_s: float | None = None,
    tokens: int = 10,
    **changes: object,
) -> TrackedRequest:
    request = RouterRequest(
        f"r-{next(_arrivals)}",
        list(range(tokens)),
        SamplingParams(),
        tenant=tenant,
        **changes,  # type: ignore[arg-type]
    )
    request.objectives = Objectives(ttft_s=ttft_s)
    request.unloaded_s, request.arrival = unloaded_s, next(_arrivals)
    request.timestamps["queued"] = at_s
    stream = TokenStream(request, lambda: None, lambda choice: None)
    return TrackedRequest(request, stream, deadline_s)


def queue_of(*lives: TrackedRequest, max_size: int = 100_000) -> RequestQueue:
    queue = RequestQueue(max_size)
    for each in lives:
        queue.add(each)
    return queue


def served(queue: RequestQueue, number: int, now_s: float = 0.0) -> list[TrackedRequest]:
    taken = []
    for _ in range(number):
        [first] = queue.first(1, now_s)
        queue.take(first)
        taken.append(first)
    return taken


# --- due times -------------------------------------------------------------------------------------------------------


def test_without_objectives_the_due_time_is_a_multiple_of_the_unloaded_time() -> None:
    assert due_s(tracked(unloaded_s=2.0).request, 10.0, None) == 16.0
    assert due_s(tracked(unloaded_s=2.0, ttft_s=1.0).request, 10.0, None) == 16.0  # a long prompt has more time
    assert due_s(tracked(unloaded_s=0.1, ttft_s=1.0).request, 10.0, None) == 11.0
    assert due_s(tracked(unloaded_s=0.1, ttft_s=1.0).request, 10.0, 10.5) == 10.5


def test_short_prompts_overtake_a_long_one_while_it_has_time_left() -> None:
    long = tracked(0.0, unloaded_s=10.0, ttft_s=1.0)
    early = tracked(1.0, unloaded_s=0.1, ttft_s=1.0)
    late = tracked(29.5, unloaded_s=0.1, ttft_s=1.0)
    assert queue_of(long, early, late).first(3, 1.0) == [early, long, late]


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.0, 3.0)), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_nobody_is_overtaken_after_its_due_time(asked: list[tuple[float, float]]) -> None:
    """Whatever comes: what arrives after the due time of one that waits is served after it."""
    arrivals = sorted(asked)
    queue, position, now_s = RequestQueue(100), 0, 0.0
    served_after: list[TrackedRequest] = []
    while position < len(arrivals) or len(queue):
        while position < len(arrivals) and arrivals[position][0] <= now_s:
            queue.add(tracked(arrivals[position][0], unloaded_s=arrivals[position][1]))
            position += 1
        if len(queue):
            [first] = served(queue, 1, now_s)
            waiting = [other.request for other in queue]
            stamps = first.request.timestamps["queued"]
            assert all(due_s(other, other.timestamps["queued"], None) >= stamps for other in waiting)
            served_after.append(first)
        now_s += 0.3
    assert len(served_after) == len(arrivals)


def test_priorities_come_before_everything_else() -> None:
    lives = [
        tracked(priority=priority, tenant=tenant) for priority, tenant in ((1, "a"), (0, "b"), (-5, "c"), (0, "b"))
    ]
    assert queue_of(*lives).first(9, 0.0) == [lives[2], lives[1], lives[3], lives[0]]


# --- lateness --------------------------------------------------------------------------------------------------------


def test_what_cannot_meet_its_objective_any_more_comes_after_what_can() -> None:
    lost = tracked(0.0, ttft_s=1.0, unloaded_s=0.2)
    fresh = [tracked(1.5, ttft_s=1.0, unloaded_s=0.2) for _ in range(3)]
    queue = queue_of(lost, *fresh)
    assert queue.first(9, 0.7) == [lost, *fresh]
    assert queue.first(9, 1.5) == [*fresh, lost]


def test_a_late_request_is_served_after_a_bounded_number_of_others_though_they_never_end() -> None:
    """The bound of the queue's docstring, under a stream of newcomers that are always in time."""
    queue = RequestQueue(10_000)
    late = [tracked(0.1 * index, ttft_s=1.0) for index in range(5)]
    for each in late:
        queue.add(each)
    waits = {}
    for number in range(60):
        for _ in range(2):
            queue.add(tracked(10.0 + number * 0.01, ttft_s=1.0))
        [first] = served(queue, 1, 10.0 + number * 0.01)
        if first in late:
            waits[late.index(first)] = number
    assert sorted(waits) == list(range(5))
    assert all(number < LATE_EVERY * (index + 1) for index, number in waits.items())
    assert sorted(waits, key=waits.__getitem__) == list(range(5))  # the one that was due first goes first


def test_what_was_served_before_anybody_was_late_is_not_counted() -> None:
    timely = [tracked(float(number)) for number in range(LATE_EVERY + 1)]
    queue = queue_of(*timely)
    served(queue, LATE_EVERY)
    queue.add(tracked(0.0, ttft_s=1.0))
    assert served(queue, 1, now_s=10.0) == timely[LATE_EVERY:]


def test_late_requests_fill_what_others_leave() -> None:
    late = [tracked(0.0, ttft_s=1.0) for _ in range(4)]
    queue = queue_of(*late)
    assert queue.first(9, 9.0) == late
    assert served(queue, 4, 9.0) == late


def test_retries_and_streams_that_go_on_are_never_late() -> None:
    retry, resumed, fresh = (tracked(at_s, ttft_s=1.0) for at_s in (0.0, 0.1, 8.9))
    retry.request.attempt_number = 1
    resumed.request.choices[0].tokens.append(SampledToken(1))
    assert queue_of(fresh, resumed, retry).first(3, 9.0) == [retry, resumed, fresh]


def test_a_deadline_counts_as_an_objective() -> None:
    lost, fresh = tracked(0.0, deadline_s=5.0, unloaded_s=1.0), tracked(4.5)
    assert queue_of(lost, fresh).first(2, 4.5) == [fresh, lost]


def test_many_that_become_late_at_once_are_moved_in_parts() -> None:
    lives = [tracked(0.0, ttft_s=1.0) for _ in range(200)]
    queue = queue_of(*lives)
    found = queue.first(16, 9.0)
    assert len(found) == 16 == len(set(found))
    [level] = queue._levels.values()
    assert len(level.late) == 32  # a look does not cost more for more that are late
    assert len(served(queue, 200, 9.0)) == 200


# --- shares ----------------------------------------------------------------------------------------------------------


def test_a_flood_does_not_delay_another_tenant() -> None:
    queue = queue_of(*[tracked(0.0, tenant="a", ttft_s=1.0) for _ in range(500)])
    served(queue, 20)
    other = tracked(0.5, tenant="b", ttft_s=1.0)
    queue.add(other)
    assert other in queue.first(2, 0.5)


def test_tenants_share_what_is_late_too() -> None:
    queue = queue_of(*[tracked(0.0, tenant="a", ttft_s=1.0) for _ in range(50)], tracked(0.1, tenant="b", ttft_s=1.0))
    queue.first(50, 60.0)
    assert "b" in {each.request.tenant for each in served(queue, 2, 60.0)}


def test_a_placement_that_found_no_room_is_paid_back_once() -> None:
    long, back, other = tracked(0.0, tenant="a", tokens=30), tracked(1.0, tenant="a"), tracked(2.0, tenant="b")
    queue = queue_of(long, back, tracked(1.5, tenant="a"), other, tracked(2.5, tenant="b"))
    queue.take(long)
    queue.take(back)
    for _ in range(2):  # the second time as one that had to stand elsewhere
        queue.add(back)
        queue.remove(back)
    assert served(queue, 1) == [other]


def test_a_late_placement_that_found_no_room_gives_no_turn_among_the_timely() -> None:
    late, first = tracked(0.0, tenant="a", ttft_s=1.0), tracked(20.0, tenant="a")
    other = tracked(30.0, tenant="b")
    queue = queue_of(late, first, tracked(21.0, tenant="a"), other, tracked(31.0, tenant="b"))
    assert served(queue, 1, now_s=10.0) == [first]
    queue.take(late)
    late.request.attempt_number = 1
    queue.add(late)
    assert served(queue, 1, now_s=10.0) == [other]


def test_a_placement_that_found_no_room_keeps_its_turn() -> None:
    first, other, more = tracked(0.0, tenant="a"), tracked(1.0, tenant="b"), tracked(0.5, tenant="a")
    queue = queue_of(first, other, more)
    assert served(queue, 1) == [first]
    queue.add(first)
    assert served(queue, 2) == [first, other]


@given(st.lists(st.sampled_from("abc"), min_size=30, max_size=80), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_no_tenant_gets_ahead_by_more_than_its_turn(tenants: list[str], tokens: int) -> None:
    """While all wait, what two tenants have got differs by a few requests, however many each has here."""
    queue = queue_of(*[tracked(0.0, tenant=tenant, tokens=tokens * (1 + "abc".index(tenant))) for tenant in tenants])
    got = dict.fromkeys("abc", 0)
    while all(any(each.request.tenant == tenant for each in queue) for tenant in set(tenants)):
        [each] = served(queue, 1)
        got[each.request.tenant] += each.request.num_prompt_tokens
        present = [got[tenant] for tenant in set(tenants)]
        assert max(present) - min(present) <= 3 * 3 * tokens


class QueueMachine(RuleBasedStateMachine):
    """Any coming, going, waiting and being served: nobody is lost, and priorities hold."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = RequestQueue(1000)
        self.now_s = 0.0
        self.here: list[TrackedRequest] = []
        self.served: list[TrackedRequest] = []

    @rule(
        tenant=st.sampled_from("ab"),
        priority=st.integers(0, 2),
        ttft_s=st.sampled_from([None, 0.5, 3.0]),
        unloaded_s=st.sampled_from([0.0, 0.2, 5.0]),
        wait_s=st.sampled_from([0.0, 0.0, 1.0]),
    )
    def come(self, tenant: str, priority: int, ttft_s: float | None, unloaded_s: float, wait_s: float) -> None:
        each = tracked(self.now_s, tenant=tenant, priority=priority, ttft_s=ttft_s, unloaded_s=unloaded_s)
        each.not_before_s = self.now_s + wait_s
        self.queue.add(each, apart=wait_s > 0)
        self.here.append(each)

    @rule(seconds=st.floats(0.0, 2.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @precondition(lambda self: self.queue.first(1, self.now_s))
    @rule(place=st.integers(0, 5))
    def serve(self, place: int) -> None:
        """Perhaps one that is not the first: those before it found no room."""
        found = self.queue.first(16, self.now_s)
        each = found[min(place, len(found) - 1)]
        self.queue.take(each)
        self.here.remove(each)
        self.served.append(each)

    @precondition(lambda self: self.served)
    @rule()
    def come_back(self) -> None:
        each = self.served.pop()
        each.not_before_s = 0.0
        self.queue.add(each)
        self.here.append(each)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(self.here))
        self.queue.remove(each)
        self.here.remove(each)

    @invariant()
    def everybody_is_there_once(self) -> None:
        found = self.queue.first(1000, self.now_s)
        ready = [each for each in self.here if not each.is_put_off(self.now_s)]
        assert set(found) == set(ready) and len(found) == len(ready) == self.queue.num_waiting
        assert set(self.queue) == set(self.here) and len(self.queue) == len(self.here)
        assert [each.request.priority for each in found] == sorted(each.request.priority for each in found)
        assert found[:3] == self.queue.first(3, self.now_s)
        assert sum(self.queue.num_by_class.values()) == len(self.here)
        for priority, level in self.queue._levels.items():
            hurried = [each for each in ready if each.request.priority == priority and each.request.objectives.ttft_s]
            assert level.num_hurried == len(hurried)


def test_those_that_nobody_can_be_late_for_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, looked = queue_of(*(tracked(unloaded_s=1.0) for _ in range(9))), list[PriorityLevel]()

    def look(self: RequestQueue, level: PriorityLevel) -> list[object]:
        looked.append(level)
        return []

    monkeypatch.setattr(RequestQueue, "_line", look)
    queue.triage(0.0, 1.0, ArrivalLoad())
    assert not looked
    queue.add(hurried := tracked(unloaded_s=1.0, ttft_s=1.0))
    queue.triage(0.0, 1.0, ArrivalLoad())
    assert looked
    looked.clear()
    queue.remove(hurried)
    queue.triage(0.0, 1.0, ArrivalLoad())
    assert not looked


TestQueue = pytest.mark.slow(QueueMachine.TestCase)
TestQueue.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# --- apart -----------------------------------------------------------------------------------------------------------


def test_those_put_off_join_when_their_time_has_come() -> None:
    put_off = tracked(0.0)
    put_off.not_before_s = 2.0
    queue = RequestQueue(10)
    queue.add(put_off, apart=True)
    assert queue.first(5, 1.9) == [] and queue.num_waiting == 0 and len(queue) == 1
    assert queue.first(5, 2.0) == [put_off] and queue.num_waiting == 1


def test_who_runs_alone_is_in_nobodys_way() -> None:
    alone, other = tracked(0.0), tracked(1.0)
    alone.strikes = {("d-0", 1), ("d-1", 1)}
    queue = RequestQueue(10)
    queue.add(alone, apart=True)
    queue.add(other)
    assert queue.first(5, 2.0) == [other] and queue.alone(2.0) == [alone]
    queue.remove(alone)
    queue.remove(alone)
    assert queue.alone(2.0) == [] and len(queue) == 1


# --- for newcomers ---------------------------------------------------------------------------------------------------


def test_what_is_ahead_is_what_is_more_urgent_or_due_before() -> None:
    queue = queue_of(
        tracked(0.0, ttft_s=1.0, tokens=7),
        tracked(0.0, ttft_s=1.0, unloaded_s=50.0, tokens=1000),  # a long one: a short newcomer overtakes it
        tracked(0.0, ttft_s=1.0, priority=-1, tokens=20),
        tracked(0.0, ttft_s=1.0, priority=5, tokens=5000),
    )
    assert queue.ahead_of(tracked(ttft_s=1.0).request, 0.5) == (27, 2)
    assert queue.ahead_of(tracked(ttft_s=1.0, priority=-9).request, 0.5) == (0, 0)
    assert queue.ahead_of(tracked(ttft_s=1.0, priority=9).request, 0.5) == (6027, 4)


def test_a_flood_is_not_ahead_of_another_tenant() -> None:
    queue = queue_of(*[tracked(0.0, tenant="a") for _ in range(500)])
    assert queue.ahead_of(tracked(tenant="b").request, 1.0) == (10, 1)
    assert queue.ahead_of(tracked(tenant="a").request, 1.0) == (5000, 500)


def test_a_full_queue_makes_room_at_the_cost_of_who_floods_it() -> None:
    flood = [tracked(0.0, tenant="a") for _ in range(3)]
    queue = queue_of(*flood, max_size=3)
    assert queue.is_full
    assert queue.victim_for(tracked(tenant="b").request) is flood[-1]
    assert queue.victim_for(tracked(tenant="a").request) is None
    assert queue.victim_for(tracked(tenant="b", priority=1).request) is None
    nearly_even = queue_of(*flood[:2], tracked(tenant="b"), max_size=3)
    assert nearly_even.victim_for(tracked(tenant="b").request) is None, "then the other one would have fewer"


def test_who_is_late_makes_room_first() -> None:
    late, timely = tracked(0.0, tenant="a", ttft_s=1.0), [tracked(20.0, tenant="a") for _ in range(2)]
    queue = queue_of(late, *timely, max_size=3)
    queue.first(1, 10.0)
    assert queue.victim_for(tracked(20.0, tenant="b").request) is late


def test_requests_are_counted_by_class() -> None:
    first, other = tracked(request_class="batch"), tracked()
    queue = queue_of(first, other)
    assert queue.num_by_class == {"batch": 1, "default": 1}
    queue.take(first)
    queue.remove(first)
    assert queue.num_by_class == {"batch": 0, "default": 1}


# --- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_long_queue_is_as_cheap_to_look_at_as_a_short_one() -> None:
    """Counted in the keys that are compared, not in time."""
    looked = [_looks(number) for number in (100, 10_000)]
    assert looked[1] <= 2 * looked[0]


def _looks(number: int) -> int:
    queue = queue_of(*[tracked(index * 1e-3, tenant=f"t{index % 50}", ttft_s=100.0) for index in range(number)])
    calls = 0

    class Counting(dict[TrackedRequest, object]):
        def __getitem__(self, key: TrackedRequest) -> object:
            nonlocal calls
            calls += 1
            return super().__getitem__(key)

    queue._places = Counting(queue._places)  # type: ignore[assignment]
    for _ in range(10):
        found = queue.first(16, 1.0)
        queue.take(found[0])
    return calls


# --- under lasting overload ------------------------------------------------------------------------------------------


def test_prompts_too_long_for_the_load_make_way_if_they_have_time_for_a_lull() -> None:
    arrivals = ArrivalLoad()
    for step in range(600):
        arrivals.add(0, 0.1, step / 10)  # a second of work a second
        arrivals.add(0, 2.0, step / 10)
    long = tracked(45.0, unloaded_s=10.0, ttft_s=1.0)  # due at 75 s: it may wait for five
    hasty = tracked(58.5, unloaded_s=2.0, ttft_s=1.0)  # due at 64.5 s: it has no time for that
    short = tracked(60.0, unloaded_s=0.1, ttft_s=20.0)
    queue = queue_of(long, hasty, short)
    for rate, load in ((100.0, ArrivalLoad()), (100.0, arrivals)):  # nothing is known of the load, all of it fits
        queue.triage(60.0, rate, load)
        assert queue.first(3, 60.0) == [hasty, long, short]
    queue.triage(60.0, 10.0, arrivals)
    assert queue.first(3, 60.0) == [hasty, short, long]


# --- the late ones' share --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unloaded_s", "places"), [(0.0, [7, 15]), (2.0, [14, 29])])
def test_a_late_request_waits_for_so_many_others_and_so_many_times_its_own_work(
    unloaded_s: float, places: list[int]
) -> None:
    late = [tracked(0.0, ttft_s=1.0, unloaded_s=unloaded_s) for _ in range(2)]
    queue = queue_of(*late, *(tracked(10.0, unloaded_s=1.0) for _ in range(40)))
    told = queue.first(42, 10.0)
    assert [told.index(each) for each in late] == places
    assert served(queue, 42, 10.0) == told


def test_a_newcomer_waits_for_the_late_ones_whose_turn_comes_before_it() -> None:
    queue = queue_of(*(tracked(0.0, ttft_s=1.0) for _ in range(3)), *(tracked(10.0) for _ in range(14)))
    queue.first(1, 10.0)
    assert queue.ahead_of(tracked().request, 10.0) == (160, 16)


def test_a_flood_of_late_requests_makes_room_too() -> None:
    late = [tracked(0.0, tenant="a", ttft_s=1.0) for _ in range(3)]
    queue = queue_of(*late, max_size=3)
    queue.first(1, 10.0)
    assert queue.victim_for(tracked(20.0, tenant="b").request) is late[-1]


# --- what does not count ---------------------------------------------------------------------------------------------


def test_background_requests_take_nobodys_place_and_make_none() -> None:
    queue = queue_of(*(tracked(tenant="a", priority=1, is_background=True) for _ in range(3)), max_size=1)
    assert not queue.is_full and queue.num_bounded == 0
    assert queue.victim_for(tracked(tenant="b").request) is None
    queue.add(tracked())
    assert queue.is_full


def test_tokens_are_those_of_a_priority_and_of_what_is_more_urgent() -> None:
    queue = queue_of(tracked(priority=0, tokens=7), tracked(priority=1, tokens=20), tracked(priority=5, tokens=100))
    assert [queue.tokens_up_to(priority) for priority in (-1, 0, 1, 9)] == [0, 7, 27, 127]


def test_priorities_of_which_nobody_waits_any_more_are_forgotten() -> None:
    placed, gone = tracked(priority=3), tracked(priority=4)
    queue = queue_of(placed, gone)
    queue.take(placed)
    queue.remove(gone)
    assert not queue._levels and not queue._priorities


def test_who_stands_apart_is_placed_from_there() -> None:
    apart = tracked()
    queue = RequestQueue(10)
    queue.add(apart, apart=True)
    queue.take(apart)
    assert not len(queue) and queue.num_by_class == {"default": 0}


def test_who_no_worker_could_hold_is_looked_at_again_once_when_the_workers_are_others() -> None:
    aside = tracked()
    queue = queue_of(aside)
    seen = []
    for membership in (1, 1, 2):
        aside.search.is_aside = True
        queue.set_apart(aside)
        queue.look_again(membership)
        seen.append(queue.first(1, 0.0) == [aside])
    assert seen == [True, False, True]


def test_one_kind_alone_goes_by_priority_and_then_by_due_time() -> None:
    less_urgent, second, first, embedding = tracked(0.0, priority=1), tracked(5.0), tracked(1.0), tracked(0.0)
    embedding.request.pooling = "last"  # type: ignore[assignment]
    queue = queue_of(less_urgent, second, first, embedding)
    assert queue.first(9, 0.0, embeddings=False) == [first, second, less_urgent]
    assert queue.first(9, 0.0, embeddings=True) == [embedding]


def test_who_runs_alone_goes_by_priority_and_then_by_arrival_once_its_time_has_come() -> None:
    lives = [tracked(priority=1), tracked(), tracked(), tracked()]
    queue = RequestQueue(10)
    for each in lives[0], lives[2], lives[1], lives[3]:
        each.strikes = {("d-0", 1), ("d-1", 1)}
        queue.add(each, apart=True)
    lives[3].not_before_s = 5.0
    assert queue.alone(1.0) == [lives[1], lives[2], lives[0]]


def test_a_newcomers_own_deadline_moves_it_forward() -> None:
    queue = queue_of(tracked(0.0, ttft_s=5.0), tracked(0.0, ttft_s=5.0))
    assert queue.ahead_of(tracked(ttft_s=5.0).request, 1.0) == (20, 2)
    assert queue.ahead_of(tracked(ttft_s=5.0, timeout_s=1.0).request, 1.0) == (0, 0)


def test_by_arrival_a_long_prompt_is_neither_overtaken_nor_behind_who_comes_later() -> None:
    long, short = tracked(0.0, unloaded_s=10.0), tracked(1.0)
    queue = RequestQueue(10, by_arrival=True)
    queue.add(short)
    queue.add(long)
    assert queue.first(2, 1.0) == [long, short]
    assert queue.ahead_of(tracked(unloaded_s=10.0).request, 0.5) == (10, 1)


def test_of_two_that_have_more_the_one_that_has_most_makes_room() -> None:
    most = [tracked(tenant="a") for _ in range(4)]
    queue = queue_of(*most, *(tracked(tenant="c") for _ in range(2)), max_size=6)
    assert queue.victim_for(tracked(tenant="b").request) is most[-1]


def test_of_two_that_cannot_both_make_it_the_longer_one_makes_way() -> None:
    long, short = tracked(unloaded_s=10.0, ttft_s=1.0), tracked(unloaded_s=0.1, ttft_s=31.0)
    queue = queue_of(long, short)
    queue.triage(0.0, 1.0, ArrivalLoad())
    assert queue.first(2, 0.0) == [long, short]
    queue.triage(0.0, 0.3, ArrivalLoad())
    assert queue.first(2, 0.0) == [short, long]
