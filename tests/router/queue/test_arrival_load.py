"""Which prompts are too long to be served beside what is offered."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.router.queue.arrival_load import ArrivalLoad

RATE = 1.0


def arrivals(*loads: tuple[int, float, float], seconds: float = 60.0) -> ArrivalLoad:
    """Of each (priority, seconds of work, requests a second), evenly."""
    load = ArrivalLoad()
    for step in range(round(seconds * 10)):
        for priority, work_s, per_s in loads:
            if step * per_s // 10 != (step + 1) * per_s // 10:
                load.add(priority, work_s, step / 10)
    return load


def test_nothing_is_too_long_while_all_can_be_done() -> None:
    assert arrivals((0, 0.1, 2.0), (0, 1.0, 0.3)).longest_s(0, 60.0, RATE) == math.inf
    assert ArrivalLoad().longest_s(0, 0.0, RATE) == math.inf


def test_under_lasting_overload_the_longest_have_no_room_beside_the_shorter_ones() -> None:
    load = arrivals((0, 0.1, 5.0), (0, 5.0, 0.5))  # 0.5 and 2.5 seconds of work a second
    assert 0.1 < load.longest_s(0, 60.0, RATE) <= 5.0
    assert load.longest_s(0, 60.0, 4 * RATE) == math.inf  # with four times the workers all have


def test_more_urgent_work_takes_its_room_first() -> None:
    load = arrivals((-1, 0.1, 9.0), (0, 0.2, 1.0))
    assert load.longest_s(0, 60.0, RATE) <= 0.2
    assert load.longest_s(-1, 60.0, RATE) <= 0.1  # 0.9 is beyond what is given away
    assert load.longest_s(-1, 60.0, 2 * RATE) == math.inf
    assert load.longest_s(1, 60.0, 2 * RATE) == math.inf  # nobody of that priority came


def test_what_was_long_ago_counts_no_more() -> None:
    load = arrivals((0, 5.0, 1.0))
    assert load.longest_s(0, 60.0, RATE) <= 5.0
    assert load.longest_s(0, 160.0, RATE) == math.inf


def test_a_day_without_a_request_is_no_trouble() -> None:
    load = arrivals((0, 5.0, 1.0))
    assert load.longest_s(0, 100_000.0, RATE) == math.inf
    load = arrivals((0, 5.0, 1.0))
    load.add(0, 5.0, 100_000.0)
    assert load.longest_s(0, 100_000.0, RATE) == math.inf


def test_a_first_burst_says_nothing_of_the_load() -> None:
    load = ArrivalLoad()
    for _ in range(100):
        load.add(0, 1.0, 0.0)
    assert load.longest_s(0, 1.0, RATE) == math.inf


def test_clients_may_name_any_number_of_priorities() -> None:
    load = ArrivalLoad()
    for priority in range(10_000):
        load.add(priority, 1.0, 0.0)
    assert len(load._levels) <= 64


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.001, 20.0), min_size=1, max_size=40), st.floats(0.5, 16.0))
def test_the_load_below_the_limit_fits(works: list[float], rate: float) -> None:
    load = ArrivalLoad()
    for step in range(4000):  # far longer than it remembers, across many rebasings
        load.add(0, works[step % len(works)], step * 1.0)
    longest_s = load.longest_s(0, 4000.0, rate)
    fitting = sum(work for work in works if work < longest_s) / len(works)
    assert fitting <= rate
    if longest_s == math.inf:
        assert sum(works) / len(works) == pytest.approx(fitting)


def test_an_overload_is_seen_soon_after_the_start() -> None:
    assert arrivals((0, 1.0, 2.0), seconds=6.0).longest_s(0, 6.0, RATE) <= 1.0


def test_no_prompt_is_too_long_to_be_counted() -> None:
    assert arrivals((0, 1e6, 1.0)).longest_s(0, 60.0, RATE) <= 1e6


def test_priorities_of_long_ago_leave_their_places_to_others() -> None:
    load = ArrivalLoad()
    for priority in range(64):
        load.add(priority, 1.0, 0.0)
    load.add(0, 5.0, 1000.0)
    load.add(1000, 2.0, 1000.0)
    assert {priority: sum(level) for priority, level in load._levels.items()} == {0: 5.0, 1000: 2.0}
