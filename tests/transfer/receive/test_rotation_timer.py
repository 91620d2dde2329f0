"""When agents are replaced: the policy alone, with a clock that is moved by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.tests.fake_clock import FakeClock
from kvferry.transfer.backends.reach import MAX_REPAIR_S, REPAIR_S
from kvferry.transfer.receive.rotation_timer import (
    CANCEL_S,
    MAX_AGE_S,
    MIN_INTERVAL_S,
    RETRY_S,
    SETTLE_S,
    Action,
    Phase,
    Quarantined,
    RotationTimer,
    Scene,
)

DEAD, YOUNG, SETTLED = Quarantined(5, 0.0, True), Quarantined(5, 0.5, False), Quarantined(5, 1.0, False)
OLD = Quarantined(5, MAX_AGE_S, False)


def _scene(*quarantined: Quarantined, num_open: int = 0, num_closing: int = 0, is_wanted: bool = False) -> Scene:
    return Scene(100, quarantined, num_open, num_closing, is_wanted)


@pytest.mark.parametrize(
    ("scene", "is_due"),
    [
        (_scene(is_wanted=True), False),  # nothing would be freed
        (_scene(DEAD), False),
        (_scene(DEAD, is_wanted=True), True),
        (_scene(YOUNG, is_wanted=True), False),  # it may still end by itself
        (_scene(SETTLED, is_wanted=True), True),
        (_scene(SETTLED), False),
        (_scene(OLD), True),
        (_scene(Quarantined(5, MAX_AGE_S, True)), True),
        (_scene(Quarantined(11, 0.0, True)), True),
        (_scene(Quarantined(10, 0.0, True)), False),
        (_scene(Quarantined(11, 0.5, False)), False),
        (_scene(Quarantined(11, 1.0, False)), True),
        (_scene(Quarantined(6, 1.0, False), Quarantined(6, 0.0, True)), True),
    ],
)
def test_a_rotation_begins_when_it_is_worth_its_cost(scene: Scene, is_due: bool) -> None:
    assert (RotationTimer(FakeClock(50.0)).step(scene) is Action.ROTATE) is is_due


def test_open_handoffs_get_a_second_to_arrive() -> None:
    clock = FakeClock(50.0)
    timer = RotationTimer(clock)
    assert timer.step(_scene(OLD, num_open=2)) is Action.NONE and timer.phase is Phase.SETTLING
    clock.advance(SETTLE_S / 2)
    assert timer.step(_scene(OLD, num_open=1)) is Action.NONE
    assert timer.step(_scene(OLD)) is Action.ROTATE  # the last one has arrived: nothing to wait for


def test_those_that_have_not_arrived_are_cancelled_and_get_time_to_end() -> None:
    clock = FakeClock(50.0)
    timer = RotationTimer(clock)
    timer.step(_scene(OLD, num_open=1))
    clock.advance(SETTLE_S)
    assert timer.step(_scene(OLD, num_open=1)) is Action.CANCEL
    assert timer.step(_scene(OLD, num_closing=1)) is Action.NONE
    clock.advance(CANCEL_S)
    assert timer.step(_scene(OLD, num_closing=1)) is Action.ROTATE


def test_a_quarantine_that_ends_by_itself_calls_it_off() -> None:
    timer = RotationTimer(FakeClock(50.0))
    timer.step(_scene(OLD, num_open=1))
    assert timer.step(_scene(num_open=1)) is Action.NONE and timer.is_idle


def test_two_rotations_are_seconds_apart() -> None:
    clock = FakeClock(50.0)
    timer = RotationTimer(clock)
    assert timer.step(_scene(OLD)) is Action.ROTATE
    assert timer.step(_scene(OLD)) is Action.NONE  # it runs
    timer.rotated(are_whole=True)
    assert timer.is_idle and timer.num_rotations == 1
    clock.advance(MIN_INTERVAL_S - 0.1)
    assert timer.step(_scene(OLD, is_wanted=True)) is Action.NONE and timer.is_idle
    clock.advance(0.1)
    assert timer.step(_scene(OLD)) is Action.ROTATE


def test_a_rotation_that_failed_is_tried_again_and_nothing_is_opened_meanwhile() -> None:
    clock = FakeClock(50.0)
    timer = RotationTimer(clock)
    timer.step(_scene(OLD))
    timer.failed()
    told = [(timer.has_failed, timer.is_idle)]
    assert timer.step(_scene()) is Action.NONE
    clock.advance(RETRY_S)
    assert timer.step(_scene()) is Action.ROTATE  # there is no agent, whether or not anything lies in quarantine
    told.append((timer.has_failed, timer.is_idle))
    timer.rotated(are_whole=True)
    told.append((timer.has_failed, timer.is_idle))
    assert told == [(True, False), (True, False), (False, True)]
    assert (timer.num_rotations, timer.num_failures) == (1, 1)


def _crippled(clock: FakeClock) -> RotationTimer:
    timer = RotationTimer(clock)
    assert timer.step(_scene(OLD)) is Action.ROTATE
    timer.rotated(are_whole=False)
    return timer


def test_agents_that_lack_a_device_are_replaced_again_ever_more_rarely() -> None:
    clock = FakeClock(50.0)
    timer = _crippled(clock)
    for wait_s in (REPAIR_S, 2 * REPAIR_S, 4 * REPAIR_S):
        clock.advance(wait_s - 0.1)
        assert timer.step(_scene()) is Action.NONE and timer.wants_repair
        clock.advance(0.2)
        assert timer.step(_scene()) is Action.ROTATE
        timer.rotated(are_whole=False)
    for _ in range(10):
        clock.advance(MAX_REPAIR_S)
        assert timer.step(_scene()) is Action.ROTATE
        timer.rotated(are_whole=False)
    clock.advance(MAX_REPAIR_S)
    timer.step(_scene())
    timer.rotated(are_whole=True)
    clock.advance(10 * MAX_REPAIR_S)
    assert timer.step(_scene()) is Action.NONE and not timer.wants_repair
    assert timer.step(_scene(OLD)) is Action.ROTATE
    timer.rotated(are_whole=False)
    clock.advance(REPAIR_S)
    assert timer.step(_scene()) is Action.ROTATE  # another outage begins anew


def test_a_repair_waits_for_open_handoffs_and_gives_up_none() -> None:
    clock = FakeClock(50.0)
    timer = _crippled(clock)
    clock.advance(REPAIR_S)
    assert timer.step(_scene(num_open=1)) is Action.NONE and timer.phase is Phase.REPAIRING
    clock.advance(SETTLE_S / 2)
    assert timer.step(_scene(num_closing=1)) is Action.NONE
    assert timer.step(_scene()) is Action.ROTATE
    timer.rotated(are_whole=False)
    clock.advance(2 * REPAIR_S)
    timer.step(_scene(num_open=1))
    clock.advance(SETTLE_S)
    assert timer.step(_scene(num_open=1)) is Action.NONE and timer.is_idle  # put off
    assert timer.step(_scene()) is Action.NONE
    clock.advance(REPAIR_S)
    assert timer.step(_scene()) is Action.ROTATE


_quarantined = st.builds(
    Quarantined, st.integers(1, 60), st.sampled_from([0.0, 0.9, 1.0, 5.0, 10.0, 60.0]), st.booleans()
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.1, 0.6, 1.0, 5.0, 40.0]),
            st.lists(_quarantined, max_size=3),
            st.integers(0, 2),
            st.integers(0, 2),
            st.booleans(),
            st.sampled_from(["rotated", "rotated", "crippled", "failed", "running"]),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_whatever_happens_rotations_keep_their_distance_and_follow_a_second_of_grace(
    story: list[tuple[float, list[Quarantined], int, int, bool, str]],
) -> None:
    clock = FakeClock(100.0)
    timer = RotationTimer(clock)
    rotated_at = began_at = -1000.0
    is_running = False
    for seconds, quarantined, num_open, num_closing, is_wanted, outcome in story:
        clock.advance(seconds)
        before, wants_repair = timer.phase, timer.wants_repair
        scene = _scene(*quarantined, num_open=num_open, num_closing=num_closing, is_wanted=is_wanted)
        action = timer.step(scene)
        if before is Phase.IDLE and timer.phase is not Phase.IDLE:
            began_at = clock.now()
            assert began_at - rotated_at >= MIN_INTERVAL_S
        if action is Action.CANCEL:
            assert num_open and clock.now() - began_at >= SETTLE_S
        if action is Action.ROTATE and before is not Phase.ROTATING:
            assert quarantined or wants_repair, "a rotation that frees nothing"
            assert quarantined or not num_open, "a repair that costs a handoff"
        if action is Action.ROTATE or is_running:
            is_running = outcome == "running"
            if outcome in ("rotated", "crippled"):
                timer.rotated(are_whole=outcome == "rotated")
                rotated_at = clock.now()
            elif outcome == "failed":
                timer.failed()
