"""A process's own time: what passes while it stands still is left out."""

from __future__ import annotations

import pytest

from kvferry.common.clock import OwnTime
from kvferry.tests.fake_clock import FakeClock


def test_time_that_nobody_could_look_at_has_not_passed() -> None:
    clock = FakeClock(100.0)
    own_time = OwnTime(clock)
    began = own_time.now()
    for _ in range(20):
        clock.advance(0.1)
        own_time.now()
    clock.advance(60.0)
    assert own_time.now() - began == pytest.approx(2.0)
    clock.advance(0.5)
    assert own_time.now() - began == pytest.approx(2.5)
    clock.advance(30.0)
    assert own_time.now() - began == pytest.approx(2.5)


def test_a_standstill_is_told_once() -> None:
    clock = FakeClock()
    own_time = OwnTime(clock)
    clock.advance(0.5)
    assert not own_time.look()
    clock.advance(5.0)
    assert own_time.look() and not own_time.look()
