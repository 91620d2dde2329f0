"""What the autoscaler does over time: bounds, hysteresis, role changes, spikes, schedules and operators' edits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.router.autoscaler.scale_types import Bounds, Counts, Kept
from kvferry.router.state.objectives import Objectives

from .scale_world import World
from .scale_world import settings as make_settings


def steady(rate: float, **changes: object) -> World:
    return World(make_settings(), lambda now: rate, **changes)  # type: ignore[arg-type]


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rates=st.lists(st.floats(0, 200), min_size=1, max_size=6),
    least=st.integers(1, 3),
    most=st.integers(3, 12),
    total=st.integers(6, 20),
)
def test_pools_stay_within_their_bounds_whatever_comes(
    seed: int, rates: list[float], least: int, most: int, total: int
) -> None:
    bounds = Bounds(least, most)
    made = make_settings(prefill=bounds, decode=bounds, total=total, shrink_after_s=60.0)
    world = World(made, lambda now: rates[int(now // 100) % len(rates)], prefill=least, decode=least, seed=seed)
    for _ in range(100):
        decision = world.step()
        counts = world.counts()
        assert (decision.prefill, decision.decode) == (counts.prefill, counts.decode)
        assert least <= counts.prefill <= most
        assert least <= counts.decode <= most
        assert counts.total <= total


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "rate", "start"), [(1, 1.5, 1), (2, 9.0, 12), (3, 27.0, 20), (4, 60.0, 3)])
def test_steady_noisy_load_does_not_grow_within_five_minutes_of_a_shrink(seed: int, rate: float, start: int) -> None:
    """Load comes by chance: of a hundred such runs one grows so soon, whatever is decided by."""
    world = steady(rate, seed=seed, prefill=start, decode=start).run(1500)
    assert world.ups_after_downs(300.0) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])  # of fifty hours one went down and up again within five minutes
def test_a_slow_swing_is_followed_without_going_back_and_forth(seed: int) -> None:
    world = World(make_settings(), lambda now: 30 + 20 * math.sin(now / 3600), prefill=8, decode=5, seed=seed)
    world.run(3600)
    assert world.ups_after_downs(300.0) == []
    totals = [counts.total for _, _, counts in world.decisions]
    assert min(totals) < totals[0]  # more than 30 requests a second need
    assert totals[-1] > min(totals)  # an hour later they are 47


def test_pending_workers_count_so_nothing_is_asked_for_twice() -> None:
    world = steady(100.0, start_s=600.0)
    grown = [world.step().additions.total for _ in range(20)]
    assert sum(grown) == world.counts().total - 2
    assert sum(grown) < 1.5 * world.decisions[-1][1].forecast.with_headroom.total
    assert grown[-10:] == [0] * 10


def test_a_spike_is_answered_in_the_first_interval_that_shows_it() -> None:
    world = World(make_settings(total=400, prefill=Bounds(1, 200), decode=Bounds(1, 200)), lambda now: 20.0)
    world.run(900)
    before = world.counts()
    world.rate = lambda now: 200.0
    world.step()
    assert world.counts().prefill > 5 * before.prefill
    world.run(30)
    assert world.counts().decode > 4 * before.decode


@pytest.mark.slow
def test_after_a_spike_the_fleet_is_as_small_as_before_though_not_at_once() -> None:
    world = World(make_settings(), lambda now: 200.0 if 2000 <= now < 2200 else 20.0)
    world.run(900)
    before = world.counts()
    world.run(340)  # the spike, and some seconds more
    assert world.counts().total > 2 * before.total
    world.run(150)
    assert world.counts().total > 2 * before.total
    world.run(900)
    assert world.counts().total <= before.total + 1


@pytest.mark.slow
def test_a_floor_that_nobody_needs_is_left_when_the_load_is_gone() -> None:
    world = World(make_settings(), lambda now: 100.0 if now < 2000 else 0.0, prefill=5, decode=5)
    world.run(900)
    assert world.counts().total > 8
    world.run(1500)
    assert world.counts() == Counts(1, 1)


@pytest.mark.parametrize("seed", [1, 3])
def test_what_a_jump_was_answered_with_is_not_taken_back_by_the_next_decisions(seed: int) -> None:
    made = make_settings(prefill=Bounds(1, 200), decode=Bounds(1, 200), total=400)
    world = World(made, lambda now: 60.0 if now < 2000 else 200.0, prefill=8, decode=5, seed=seed).run(1000)
    world.step()
    grown = world.counts()
    assert grown.total > 25
    world.run(290)
    assert not any(decision.removals for when, decision, _ in world.decisions if when > 2000)
    assert world.counts().total >= grown.total


def test_nothing_shrinks_before_the_load_was_seen_for_a_while() -> None:
    world = steady(1.0, prefill=10, decode=10).run(295)
    assert world.counts() == Counts(10, 10)
    world.run(120)
    assert world.counts().total < 20


def test_a_role_changes_before_a_worker_is_added() -> None:
    world = steady(60.0, prefill=1, decode=14).run(60)
    flips = [flip for _, decision, _ in world.decisions for flip in decision.flips]
    assert flips and {pool for _, pool in flips} == {"prefill"}
    assert world.counts().total == 15
    assert not any(decision.additions.total for _, decision, _ in world.decisions)


def test_the_emptiest_change_their_role() -> None:
    world = steady(60.0, prefill=1, decode=14)
    loads = {name: float(int(name[2:]) % 7) for name in world.members}
    while not (decision := world.step()).flips:
        pass
    changed = [loads[name] for name, _ in decision.flips]
    others = [loads[name] for name, (pool, _) in world.members.items() if name in loads and pool == "decode"]
    assert max(changed) <= min(others)


def test_a_pools_last_worker_that_takes_work_waits_for_another_before_it_changes() -> None:
    world = steady(1.0, prefill=0, decode=2)
    world.members["d-0"] = ("decode", world.now_s + 12.0)  # it starts anew
    world.autoscaler.hold(Counts(1, 1))
    for _ in range(2):
        decision = world.step()
        assert not decision.flips and not decision.removals and not decision.additions.total
    assert [pool for _, pool in world.step().flips] == ["prefill"]
    assert world.counts(ready=True) == Counts(1, 1)


@pytest.mark.slow
def test_workers_that_cannot_change_their_role_are_added_and_removed_instead() -> None:
    world = steady(60.0, prefill=1, decode=14, can_flip=False).run(900)
    assert not any(decision.flips for _, decision, _ in world.decisions)
    assert world.counts().prefill > 4
    assert world.counts().decode < 10


def test_a_full_fleet_is_split_by_need() -> None:
    needed = steady(100.0, prefill=20, decode=20).run(60).decisions[-1][1].forecast.needed
    total = needed.total - 4
    world = World(make_settings(total=total), lambda now: 100.0, prefill=total - 2, decode=2).run(120)
    counts = world.counts()
    assert counts.total == total
    assert counts.prefill / needed.prefill == pytest.approx(counts.decode / needed.decode, abs=0.25)
    changes = [when for when, decision, _ in world.decisions if decision.flips]
    assert len(changes) <= 3


@pytest.mark.slow
def test_an_operators_counts_hold_until_they_are_released() -> None:
    world = steady(100.0).run(60)
    world.autoscaler.hold(Counts(2, 3))
    world.run(900)
    assert world.counts() == Counts(2, 3)
    assert world.decisions[-1][1].reason == "held by an operator"
    world.autoscaler.release()
    world.run(60)
    assert world.counts().prefill > 4


def test_an_operators_counts_end_by_themselves_after_their_time() -> None:
    world = steady(100.0).run(60)
    world.autoscaler.hold(Counts(2, 3), until_s=world.now_s + 60.0)
    world.run(50)
    assert world.counts() == Counts(2, 3)
    world.run(30)
    assert world.counts().prefill > 4


@pytest.mark.parametrize(
    ("window", "counts"),
    [
        ("00:00-00:00 prefill>=2 decode>=7", Counts(2, 6)),
        ("00:00-00:00 decode>=9", Counts(1, 7)),
    ],
)
def test_minima_that_are_too_many_together_are_met_as_far_as_the_bound_of_both_pools(
    window: str, counts: Counts
) -> None:
    made = make_settings(schedule=(window,), prefill=Bounds(1, 4), decode=Bounds(1, 4), total=8)
    world = World(made, lambda now: 15.0).run(120)
    assert world.counts() == counts
    assert "grows" not in world.decisions[-1][1].reason  # it cannot


def test_a_schedule_makes_no_pool_that_the_deployment_does_not_have() -> None:
    made = make_settings(schedule=("00:00-00:00 prefill>=2",), prefill=Bounds(0, 0), decode=Bounds(1, 4), total=4)
    world = World(made, lambda now: 15.0, prefill=0).run(120)
    assert {decision.prefill for _, decision, _ in world.decisions} == {0}
    assert world.counts().decode > 1


@pytest.mark.slow
def test_a_schedule_holds_workers_ready_when_its_window_begins() -> None:
    made = make_settings(schedule=("00:30-01:00 prefill>=6 decode>=4",), shrink_after_s=60.0)
    world = World(made, lambda now: 1.0, start_s=120.0, now_s=0.0)
    world.run(1600)
    assert world.counts() == Counts(1, 1)
    world.run(200)  # 00:30
    assert world.counts(ready=True) == Counts(6, 4)
    world.run(2400)
    assert world.counts() == Counts(1, 1)


@pytest.mark.slow
def test_spare_workers_stay_ready_beyond_the_need() -> None:
    plain = steady(40.0, prefill=12, decode=12).run(1800).counts()
    made = make_settings(spare_workers=2)
    spare = World(made, lambda now: 40.0, prefill=12, decode=12).run(1800).counts()
    assert spare.total == plain.total + 2


@pytest.mark.slow
def test_longer_answers_grow_the_decode_pool_alone() -> None:
    world = steady(40.0, prefill=12, decode=12, output=lambda dice, now: 100).run(1200)
    before = world.counts()
    world.output = lambda dice, now: 400
    world.run(1200)
    assert world.counts().decode > before.decode
    assert world.counts().prefill == before.prefill


def test_a_few_long_prompts_need_more_workers_than_the_same_tokens_spread_evenly() -> None:
    objectives = Objectives(ttft_s=0.5, tpot_s=0.03)
    made = make_settings(objectives=objectives)
    even = World(made, lambda now: 20.0, prompt=lambda dice, now: 1090).run(300)
    mixed = World(made, lambda now: 20.0, prompt=lambda dice, now: 20_000 if dice.random() < 0.05 else 95).run(300)
    assert mixed.decisions[-1][1].forecast.needed.prefill > even.decisions[-1][1].forecast.needed.prefill


@pytest.mark.slow
def test_misses_of_a_settled_fleet_raise_its_size_and_those_of_a_growing_one_do_not() -> None:
    missed = lambda counts: (Kept(40, 50), Kept(50, 50))  # noqa: E731
    world = steady(40.0, prefill=12, decode=12, kept=missed).run(600)
    assert 1.0 < world.decisions[-1][1].forecast.correction[0] <= 1.5
    assert world.decisions[-1][1].forecast.correction[1] == pytest.approx(1.0)
    small = World(make_settings(total=3), lambda now: 40.0, kept=missed).run(600)
    assert small.decisions[-1][1].forecast.correction == (1.0, 1.0)


def colocated(rate: float, **changes: object) -> World:
    """A deployment without prefill workers, whose prompts are long."""
    made = make_settings(prefill=Bounds(0, 0), decode=Bounds(1, 50), total=50)
    values: dict[str, object] = {"prefill": 0, "prompt": lambda dice, now: 8000, "output": lambda dice, now: 20}
    return World(made, lambda now: rate, **{**values, **changes})  # type: ignore[arg-type]


def test_a_pool_that_does_everything_is_sized_for_its_prompts_too() -> None:
    world = colocated(5.0, decode=8).run(600)  # 0.8 s each: four workers have no time for anything else
    assert world.counts().prefill == 0 and 6 <= world.counts().decode <= 10
    assert colocated(20.0, decode=2).run(60).counts().decode > 16
    embedding = colocated(20.0, decode=2, output=lambda dice, now: 0).run(60)
    assert embedding.counts().decode > 16


def test_prompts_that_wait_and_first_tokens_that_come_late_enlarge_a_pool_that_does_everything() -> None:
    usual = colocated(5.0, decode=8).run(60)
    waiting = colocated(5.0, decode=8, queued_tokens=8000 * 5 * 60).run(60)  # a minute's prompts
    assert waiting.counts().decode > usual.counts().decode + 5
    late = colocated(5.0, decode=12, kept=lambda counts: (Kept(40, 50), Kept(50, 50))).run(600)
    last = late.decisions[-1][1].forecast
    assert 1.0 < last.correction[0] <= 1.5 and last.correction[1] == pytest.approx(1.0)
    on_time = colocated(5.0, decode=12, kept=lambda counts: (Kept(50, 50), Kept(50, 50))).run(600)
    assert last.needed.decode > on_time.decisions[-1][1].forecast.needed.decode


def test_while_nothing_can_be_sized_the_fleet_stays_as_large_as_it_was_to_be() -> None:
    world = steady(50.0, prefill=3, decode=3)
    world.members.pop("p-0")
    blind = replace(world.snapshot(), limits=None)
    decision = world.autoscaler.decide(blind)
    assert (decision.prefill, decision.decode) == (2, 3) and "step times" in decision.reason
    decision = world.autoscaler.decide(replace(blind, desired=Counts(3, 3)))
    assert decision.additions == Counts(1, 0) and not decision.removals
    world.autoscaler.hold(Counts(2, 5))
    assert world.autoscaler.decide(blind).additions == Counts(0, 2)


def test_without_lengths_nothing_changes() -> None:
    world = steady(50.0, prefill=3, decode=3)
    world.prompt = lambda dice, now: 500
    for _ in range(200):
        world.now_s += 5.0
        decision = world.autoscaler.decide(replace(world.snapshot(), answers=()))
        assert not (decision.flips or decision.removals or decision.additions.total)
