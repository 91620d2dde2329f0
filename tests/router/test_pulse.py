"""The pulse knows how long its loop has not moved, and says once where it stands."""

from __future__ import annotations

import threading

import pytest
from structlog.testing import capture_logs

from kvferry.common.clock import OwnTime
from kvferry.router.pulse import SLOW_S, Pulse
from kvferry.tests.fake_clock import FakeClock


def test_lag_grows_until_the_loop_moves() -> None:
    clock = FakeClock()
    pulse = Pulse(clock)
    with capture_logs() as logs:
        clock.advance(0.25)
        assert pulse.lag_s() == 0.25
        pulse.moved()
        assert pulse.lag_s() == 0
    assert not logs


def test_a_loop_that_stood_still_with_its_whole_process_lags_by_nothing() -> None:
    clock = FakeClock()
    pulse = Pulse(OwnTime(clock))
    clock.advance(0.5)
    assert pulse.lag_s() == 0.5
    clock.advance(12.0)
    assert pulse.lag_s() == 0.5


def _held_up(begun: threading.Event, over: threading.Event, num_calls: int) -> None:
    if num_calls:
        _held_up(begun, over, num_calls - 1)
        return
    begun.set()
    over.wait()


def test_a_stop_is_told_once_with_its_place() -> None:
    clock, begun, over = FakeClock(), threading.Event(), threading.Event()
    pulses: list[Pulse] = []

    def loop() -> None:
        pulses.append(Pulse(clock))
        _held_up(begun, over, num_calls=9)

    thread = threading.Thread(target=loop)
    thread.start()
    begun.wait()
    clock.advance(SLOW_S + 0.5)
    with capture_logs() as logs:
        pulses[0].lag_s()
        pulses[0].lag_s()
    over.set()
    thread.join()
    assert [line["event"] for line in logs] == ["event_loop_stands"]
    assert logs[0]["lag_s"] == pytest.approx(SLOW_S + 0.5)
    calls = logs[0]["where"].split(" > ")
    assert len(calls) == 8 and "test_pulse.py" in calls[0] and calls[0].endswith(" _held_up")
    assert calls[-1].endswith(" wait")
