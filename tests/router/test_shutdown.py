"""How signals end a router: which ones are one, and which end it at once."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from kvferry.router import shutdown
from kvferry.router.http.in_flight import InFlight, UnderWay
from kvferry.router.shutdown import IDLE_S, INTERRUPT_LIMIT_S, Stop, wind_down


async def _signals(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        await asyncio.sleep(0.02)  # the loop's own turn for it


async def test_a_service_that_tells_all_processes_tells_a_router_twice() -> None:
    with Stop(5.0).listening() as stop:
        await _signals(signal.SIGTERM, signal.SIGTERM)
        assert stop.is_patient and not stop.at_once.is_set()
        await _signals(signal.SIGINT)
        assert stop.at_once.is_set()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("numbers", "same_s"),
    [
        ((signal.SIGTERM, signal.SIGTERM), 0.0),
        ((signal.SIGINT, signal.SIGINT), 60.0),
        ((signal.SIGINT, signal.SIGTERM), 60.0),
    ],
)
async def test_a_second_signal_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, numbers: tuple[signal.Signals, signal.Signals], same_s: float
) -> None:
    monkeypatch.setattr(shutdown, "SAME_S", same_s)
    with Stop(5.0).listening() as stop:
        await _signals(numbers[0])
        assert stop.asked.is_set() and not stop.at_once.is_set()
        assert stop.is_patient == (numbers[0] == signal.SIGTERM)
        await _signals(numbers[1])
        assert stop.at_once.is_set()


class _Front:
    """Connections that do not end."""

    def __init__(self, in_flight: InFlight) -> None:
        self._in_flight = in_flight
        self.left_with: tuple[float, bool] | None = None

    def leave(self, idle_s: float) -> None:
        self.left_with = idle_s, self._in_flight.is_leaving

    async def left(self) -> None:
        await asyncio.Event().wait()


class _Catalogue:
    """Workers' requests, which end when they are told so."""

    def __init__(self, in_flight: InFlight) -> None:
        self._in_flight = in_flight
        self.was_closing = False

    async def drain(self, timeout_s: float) -> None:
        self.was_closing = self._in_flight.is_closing


@pytest.mark.parametrize(
    ("number", "idle_s", "limit_s"), [(signal.SIGTERM, IDLE_S, 0.01), (signal.SIGINT, 0.0, INTERRUPT_LIMIT_S)]
)
async def test_what_runs_has_its_time_and_then_an_error(number: signal.Signals, idle_s: float, limit_s: float) -> None:
    in_flight = InFlight()
    answer, front, catalogue = UnderWay(in_flight), _Front(in_flight), _Catalogue(in_flight)
    with Stop(0.01).listening() as stop:
        await _signals(number)
        assert stop.limit_s == limit_s
        if number == signal.SIGINT:
            stop.at_once.set()
        async with asyncio.timeout(30.0):
            await wind_down(front, catalogue, in_flight, stop)  # type: ignore[arg-type]
    assert front.left_with == (idle_s, True) and catalogue.was_closing and answer._sending.is_cut
