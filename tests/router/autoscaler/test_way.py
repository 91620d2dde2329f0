"""The way to a fleet that is wanted: who changes its role, who leaves, how many come."""

from __future__ import annotations

import pytest

from kvferry.router.autoscaler.scale_types import (
    POOLS,
    Bounds,
    Counts,
    Member,
    MemberState,
    Pool,
    ScaleDecision,
    ScaleForecast,
)
from kvferry.router.autoscaler.way import counts_of, lend, way_to

READY, PENDING = MemberState.READY, MemberState.PENDING
BOUNDS: dict[Pool, Bounds] = {"prefill": Bounds(2, 9), "decode": Bounds(1, 9)}


def fleet(prefill: int, decode: int, *, fixed: int = 0, pending: int = 0) -> list[Member]:
    """`p-0`, `p-1`, … and `d-0`, …, the last ones the emptiest. Of each pool `fixed` ones keep their role; `pending`
    ones, the fullest, start yet."""
    return [
        Member(
            f"{pool[0]}-{number}",
            pool,
            PENDING if number < pending else READY,
            load=float(-number),
            can_change_role=number >= fixed,
        )
        for pool, count in zip(POOLS, (prefill, decode), strict=True)
        for number in range(count)
    ]


def way(wanted: Counts, members: list[Member]) -> ScaleDecision:
    return way_to(wanted, counts_of(members), members, ScaleForecast(), "a test")


@pytest.mark.parametrize(
    ("wanted", "lately", "members", "lent"),
    [
        # A pool gives what it has beyond what it needed of late, and no more than the other lacks.
        (Counts(5, 4), Counts(3, 2), fleet(5, 2), Counts(3, 4)),
        (Counts(5, 4), Counts(4, 2), fleet(5, 2), Counts(4, 4)),
        (Counts(5, 3), Counts(0, 2), fleet(5, 2), Counts(4, 3)),
        (Counts(5, 4), Counts(5, 2), fleet(5, 2), Counts(5, 4)),
        # Its bound holds, whatever it needed.
        (Counts(3, 9), Counts(0, 2), fleet(3, 2), Counts(2, 9)),
        # Who is not to change its role, or starts yet, is not lent.
        (Counts(5, 9), Counts(0, 2), fleet(5, 2, fixed=3), Counts(3, 9)),
        (Counts(5, 9), Counts(0, 2), fleet(5, 2, pending=4), Counts(4, 9)),
        # What was to be smaller anyway stays so.
        (Counts(2, 3), Counts(2, 2), fleet(5, 2), Counts(2, 3)),
        (Counts(4, 5), Counts(2, 2), fleet(3, 5), Counts(4, 4)),
    ],
)
def test_a_pool_lends_what_it_does_not_need(
    wanted: Counts, lately: Counts, members: list[Member], lent: Counts
) -> None:
    assert lend(wanted, counts_of(members), lately, BOUNDS, members) == lent


@pytest.mark.parametrize(
    ("wanted", "members", "flips", "removals", "additions"),
    [
        # The emptiest of one pool become the other's; what is still missing comes, what is too much leaves.
        (Counts(2, 4), fleet(4, 2), (("p-3", "decode"), ("p-2", "decode")), (), Counts(0, 0)),
        (Counts(3, 2), fleet(1, 3), (("d-2", "prefill"),), (), Counts(1, 0)),
        (Counts(1, 3), fleet(4, 2), (("p-3", "decode"),), ("p-2", "p-1"), Counts(0, 0)),
        (Counts(1, 1), fleet(2, 3), (), ("p-1", "d-2", "d-1"), Counts(0, 0)),
        (Counts(2, 3), fleet(1, 1), (), (), Counts(1, 2)),
        # Who keeps its role leaves, and another one comes.
        (Counts(1, 3), fleet(3, 1, fixed=9), (), ("p-2", "p-1"), Counts(0, 2)),
        # One that starts yet leaves first, and changes no role.
        (Counts(1, 1), fleet(1, 3, pending=1), (), ("d-0", "d-2"), Counts(0, 0)),
        (Counts(2, 1), fleet(1, 2, pending=2), (), ("d-1",), Counts(1, 0)),
        # The last one that takes work stays while others start, and nobody comes in place of it; not so of a pool
        # that is to be empty.
        (Counts(4, 2), fleet(3, 3, pending=2), (), (), Counts(0, 0)),
        (Counts(2, 2), fleet(1, 3, pending=1), (("d-2", "prefill"),), (), Counts(0, 0)),
        (Counts(0, 3), fleet(1, 2), (("p-0", "decode"),), (), Counts(0, 0)),
    ],
)
def test_roles_change_first_then_workers_come_and_the_rest_leaves(
    wanted: Counts,
    members: list[Member],
    flips: tuple[tuple[str, Pool], ...],
    removals: tuple[str, ...],
    additions: Counts,
) -> None:
    decision = way(wanted, members)
    assert (decision.flips, decision.removals, decision.additions) == (flips, removals, additions)
    assert (decision.prefill, decision.decode, decision.reason) == (wanted.prefill, wanted.decode, "a test")


def test_of_equally_empty_ones_the_choice_is_the_same_in_every_router() -> None:
    members = [Member(name, "decode", READY) for name in ("d-2", "d-0", "d-1")]
    assert way(Counts(1, 1), members).flips == (("d-0", "prefill"),)
    assert way(Counts(0, 2), members).removals == ("d-0",)
