"""As few as possible are put off."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from kvferry.router.queue.triage import Waiting, put_off

FOREVER = float("inf")


def jobs(*pairs: tuple[float, float]) -> list[tuple[int, Waiting]]:
    """(due, work) in order of due time."""
    return [(number, Waiting(due - work, work)) for number, (due, work) in enumerate(sorted(pairs))]


def late(ones: list[tuple[int, Waiting]], rate: float = 1.0) -> int:
    """How many start too late when served in this order."""
    work_s, number = 0.0, 0
    for _, one in ones:
        number += work_s / rate > one.start_by_s + 1e-9
        work_s += one.work_s
    return number


def test_nobody_is_put_off_while_all_can_make_it() -> None:
    assert put_off(jobs((1, 1), (2, 1), (3, 1)), 0.0, 1.0) == []


def test_one_long_prompt_makes_way_for_many_short_ones() -> None:
    waiting = [("long", Waiting(2.0, 10.0)), *((f"short-{n}", Waiting(3.0 + n, 1.0)) for n in range(5))]
    assert put_off(waiting, 0.0, 1.0) == ["long"]


def test_more_workers_make_it_all() -> None:
    waiting = [("long", Waiting(2.0, 10.0)), *((f"short-{n}", Waiting(3.0 + n, 1.0)) for n in range(5))]
    assert put_off(waiting, 0.0, 4.0) == []


def test_who_has_no_objective_is_never_put_off_and_its_work_counts() -> None:
    waiting = [("free", Waiting(FOREVER, 5.0)), ("hurried", Waiting(2.0, 1.0))]
    assert put_off(waiting, 0.0, 1.0) == ["hurried"]


def test_who_is_late_already_goes_first() -> None:
    assert put_off([("a", Waiting(-1.0, 0.1)), ("b", Waiting(5.0, 3.0))], 0.0, 1.0) == ["a"]


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8)), max_size=7))
def test_no_other_choice_leaves_fewer_late(pairs: list[tuple[int, int]]) -> None:
    waiting = jobs(*pairs)
    off = set(put_off(waiting, 0.0, 1.0))
    kept = [one for one in waiting if one[0] not in off]
    assert late(kept) == 0
    for size in range(len(off)):
        for others in combinations(range(len(waiting)), size):
            assert late([one for one in waiting if one[0] not in others]) > 0
