"""Fair shares between tenants and due times inside them: what a flood may do to the others, whatever comes when."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvferry.router.queue.fair_order import FairOrder, Ticket
from kvferry.router.queue.ordered import Ordered

_numbers = count()


def ticket(tenant: str, due_s: float = 0.0, tokens: int = 10, weight: float = 1.0) -> Ticket[str]:
    number = next(_numbers)
    return Ticket(f"{tenant}{number}", tenant, number, due_s, tokens, tokens / weight)


def served(order: FairOrder[str], number: int | None = None) -> list[Ticket[str]]:
    """Take one after the other, always the first."""
    taken: list[Ticket[str]] = []
    while len(order) and (number is None or len(taken) < number):
        taken.append(next(iter(order)))
        order.take(taken[-1])
    return taken


def names(tickets: list[Ticket[str]]) -> str:
    return "".join(each.tenant for each in tickets)


# --- the sorted sequence ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=1200), st.integers(0, 10**6), st.data())
@settings(max_examples=30, deadline=None)
def test_runs_hold_what_a_sorted_list_holds(keys: list[int], key: int, data: st.DataObject) -> None:
    runs: Ordered[tuple[int, str]] = Ordered(lambda entry: entry[0])
    for each in keys:
        runs.add((each, "x"))
    gone = data.draw(st.sets(st.sampled_from(keys))) if keys else set()
    for each in gone:
        runs.remove((each, "x"))
    left = sorted(set(keys) - gone)
    assert [entry[0] for entry in runs] == left and [entry[0] for entry in reversed(runs)] == left[::-1]
    assert len(runs) == len(left) and runs.weight == sum(left)
    before = [each for each in left if each < key]
    assert runs.before((key,)) == (sum(before), len(before))
    if left:
        assert runs.first[0] == left[0]


# --- shares ----------------------------------------------------------------------------------------------------------


def test_one_tenants_requests_go_by_due_time_and_then_by_arrival() -> None:
    order: FairOrder[str] = FairOrder()
    tickets = [ticket("a", due_s) for due_s in (3.0, 1.0, 2.0, 1.0)]
    for each in tickets:
        order.add(each)
    assert served(order) == [tickets[i] for i in (1, 3, 2, 0)]


def test_a_newcomer_waits_for_one_request_of_a_flood() -> None:
    order: FairOrder[str] = FairOrder()
    for _ in range(1000):
        order.add(ticket("a", due_s=1.0))
    served(order, 100)
    order.add(ticket("b", due_s=9.0))
    assert names(served(order, 3)).index("b") <= 1


def test_two_floods_get_equal_service_though_one_is_due_first() -> None:
    order: FairOrder[str] = FairOrder()
    for _ in range(100):
        order.add(ticket("a", due_s=1.0))
        order.add(ticket("b", due_s=2.0, tokens=30))
    tokens: Counter[str] = Counter()
    for each in served(order, 80):
        tokens[each.tenant] += each.num_tokens
        assert abs(tokens["a"] - tokens["b"]) <= 40
    assert tokens["a"] and tokens["b"]


def test_weights_divide_the_service() -> None:
    order: FairOrder[str] = FairOrder()
    for _ in range(200):
        order.add(ticket("a"))
        order.add(ticket("b", weight=3.0))
    counts = Counter(names(served(order, 100)))
    assert abs(counts["b"] - 3 * counts["a"]) <= 4


def test_where_nobody_floods_due_times_alone_decide() -> None:
    order: FairOrder[str] = FairOrder()
    tickets = [ticket(f"{index:03}", due_s=float((index * 37) % 100)) for index in range(100)]
    for each in tickets:
        order.add(each)
    assert [each.due_s for each in served(order, 20)] == sorted(each.due_s for each in tickets)[:20]


def test_who_leaves_and_comes_back_does_not_start_anew() -> None:
    order: FairOrder[str] = FairOrder()
    for _ in range(10):
        order.add(ticket("b", due_s=5.0))
    order.add(ticket("a", due_s=1.0, tokens=100))
    assert names(served(order, 1)) == "a"  # and it has nothing more here
    order.add(ticket("a", due_s=1.0, tokens=100))
    assert names(served(order, 10)) == "b" * 10


def test_a_request_that_comes_back_unserved_is_not_charged_twice() -> None:
    order: FairOrder[str] = FairOrder()
    first, other = ticket("a", 1.0), ticket("b", 2.0)
    for each in (first, ticket("a", 3.0), other):
        order.add(each)
    order.take(first)
    order.add(first, refund=True)
    assert served(order, 2) == [first, other]


def test_fresh_names_do_not_keep_an_old_tenant_out_for_ever() -> None:
    """Somebody who invents a tenant for each of its requests is never ahead: time is what passes for the others."""
    order: FairOrder[str] = FairOrder()
    for _ in range(3):
        order.add(ticket("old", due_s=100.0))
    waits: list[int] = []
    since = 0
    for index in range(400):
        order.add(ticket(f"new-{index}", due_s=float(index)))
        [each] = served(order, 1)
        since += 1
        if each.tenant == "old":
            waits.append(since)
            since = 0
    assert len(waits) == 3 and waits[0] <= 102 and max(waits[1:]) <= 4
    assert len(order._left) <= 4 and len(order._leaving) <= 4  # of those that have left only who is still ahead


def test_what_is_ahead_of_a_newcomer_is_its_own_tenants_and_the_others_share() -> None:
    order: FairOrder[str] = FairOrder()
    for index in range(600):
        order.add(ticket("a", due_s=float(index), tokens=10))
    assert order.ahead_of("a", 50.5, 10) == (510, 51)
    assert order.ahead_of("b", 1e9, 20) == (20, 2)  # as much as it asks for itself
    order.add(ticket("b", due_s=0.0, tokens=30))
    assert order.ahead_of("b", 1e9, 20) == (80, 6)
    assert order.ahead_of("c", 0.0, 10**9) == (6030, 601)


class FairOrderMachine(RuleBasedStateMachine):
    """Any coming and going. The model is a list, and what each tenant has got while it waited."""

    def __init__(self) -> None:
        super().__init__()
        self.order: FairOrder[str] = FairOrder()
        self.waiting: list[Ticket[str]] = []
        self.got: Counter[str] = Counter()  # by (a, b): what a got while b waited all the time
        self.passed: Counter[str] = Counter()

    @rule(tenant=st.sampled_from("abcd"), due_s=st.floats(0, 100, allow_nan=False), tokens=st.integers(1, 50))
    def come(self, tenant: str, due_s: float, tokens: int) -> None:
        each = ticket(tenant, due_s, tokens)
        self.order.add(each)
        self.waiting.append(each)

    @precondition(lambda self: self.waiting)
    @rule()
    def serve(self) -> None:
        tenants = {each.tenant for each in self.waiting}
        each = next(iter(self.order))
        self.order.take(each)
        self.waiting.remove(each)
        self.passed[each.tenant] = 0
        for other in tenants - {each.tenant}:
            self.passed[other] += each.num_tokens
        for tenant in tenants - {other.tenant for other in self.waiting}:
            self.passed[tenant] = 0

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(self.waiting))
        self.order.remove(each)
        self.waiting.remove(each)
        if each.tenant not in {other.tenant for other in self.waiting}:
            self.passed[each.tenant] = 0

    @invariant()
    def everybody_is_there_once(self) -> None:
        listed = list(self.order)
        assert sorted(each.number for each in listed) == sorted(each.number for each in self.waiting)
        assert len(self.order) == len(self.waiting)
        assert self.order.num_tokens == sum(each.num_tokens for each in self.waiting)

    @invariant()
    def a_tenants_own_order_is_by_due_time(self) -> None:
        for tenant in "abcd":
            own = [(each.due_s, each.number) for each in self.order if each.tenant == tenant]
            assert own == sorted(own)

    @invariant()
    def nobody_is_passed_over_for_ever(self) -> None:
        """Three others lead by at most a request each, and each round of virtual time serves all that wait."""
        num = 4
        assert all(tokens <= num * num * 50 for tokens in self.passed.values())


TestFairOrder = pytest.mark.slow(FairOrderMachine.TestCase)
TestFairOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 20), st.integers(1, 30)), max_size=40), st.integers(0, 15)
)
@settings(max_examples=150, deadline=None)
def test_the_order_that_is_read_is_the_order_of_service(asked: list[tuple[str, int, int]], before: int) -> None:
    order: FairOrder[str] = FairOrder()
    for tenant, due_s, tokens in asked:
        order.add(ticket(tenant, float(due_s), tokens))
    served(order, before)
    told = list(order)
    assert served(order) == told


def test_who_was_ahead_when_nobody_waited_any_more_begins_anew() -> None:
    order: FairOrder[str] = FairOrder()
    large, other = ticket("a", tokens=1000), ticket("b")
    for each in (large, other):
        order.add(each)
    order.take(large)
    order.take(other)
    order.add(ticket("a", due_s=1.0))
    order.add(ticket("b", due_s=2.0))
    assert names(served(order)) == "ab"


def test_who_comes_back_and_goes_again_is_as_far_ahead_as_it_was_last() -> None:
    order: FairOrder[str] = FairOrder()
    others = [ticket("b", due_s=float(number)) for number in range(9)]
    small, large = ticket("a"), ticket("a", tokens=1000)
    for each in (small, *others):
        order.add(each)
    order.take(small)
    order.add(large)
    order.take(large)
    for each in others[:4]:  # past where it was ahead the first time
        order.take(each)
    order.add(ticket("a", due_s=-1.0))
    assert names(served(order, 3)) == "bbb"


def test_a_turn_that_was_paid_back_is_not_held_against_who_comes_later() -> None:
    order: FairOrder[str] = FairOrder()
    large = ticket("a", tokens=1000)
    for each in (large, ticket("b", due_s=1.0), ticket("b", due_s=2.0)):
        order.add(each)
    order.take(large)
    order.add(large, refund=True)
    order.remove(large)
    order.add(ticket("a", due_s=0.5))
    assert names(served(order, 1)) == "a"


def test_time_goes_on_to_who_is_ahead_when_the_others_leave_unserved() -> None:
    order: FairOrder[str] = FairOrder()
    large, leaves = ticket("a", tokens=100), ticket("b", due_s=2.0)
    for each in (large, ticket("a", due_s=1.0), leaves):
        order.add(each)
    order.take(large)
    order.remove(leaves)
    order.add(ticket("c", due_s=5.0))
    assert names(served(order)) == "ac"
