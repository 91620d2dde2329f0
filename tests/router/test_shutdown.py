"""How signals end a router: which ones are one, and which end it at once."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from kvferry.router import shutdown
from kvferry.router.shutdown import Stop


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


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,) * 2, (signal.SIGINT,) * 2, (signal.SIGINT, signal.SIGTERM)])
async def test_a_second_signal_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, numbers: tuple[signal.Signals, signal.Signals]
) -> None:
    monkeypatch.setattr(shutdown, "SAME_S", 0.0)
    with Stop(5.0).listening() as stop:
        await _signals(numbers[0])
        assert stop.asked.is_set() and not stop.at_once.is_set()
        assert stop.is_patient == (numbers[0] == signal.SIGTERM)
        await _signals(numbers[1])
        assert stop.at_once.is_set()
