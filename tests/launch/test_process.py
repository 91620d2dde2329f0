"""What a launcher takes for hung: silence, or an event loop that stands still for too long; not one that is busy."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvferry.common.clock import SystemClock
from kvferry.common.errors import WorkerLost
from kvferry.launch.child_process import Command
from kvferry.launch.process import Child, ChildTimes

WAIT_S = 120.0
TIMES = ChildTimes(hang_after_s=1.0, grace_s=1.0, first_backoff_s=0.05)
# Stands still for `sys.argv[1]` seconds, again and again; a long time in steps, as Python code that runs would.
PROGRAM = """
import asyncio, sys, time
from kvferry.common.clock import OwnTime, SystemClock
from kvferry.wire.lifeline import Lifeline
from kvferry.router.pulse import Pulse

async def main():
    lifeline = Lifeline.from_fds(int(sys.argv[3]), None)
    pulse = Pulse(OwnTime(SystemClock()))
    lifeline.ready()
    lifeline.beat_with(pulse.lag_s)
    while True:
        pulse.moved()
        for _ in range(round(float(sys.argv[1]) / 0.1)):
            time.sleep(0.1)
        lifeline.send({"event": "round"})
        await asyncio.sleep(0)

asyncio.run(main())
"""


class Watched:
    """A child, and what it told."""

    def __init__(self, still_s: float, times: ChildTimes) -> None:
        command = Command((sys.executable, "-c", PROGRAM, str(still_s)), os.environ)
        self.child = Child("it", lambda: command, SystemClock(), times=times, on_event=self._note)
        self.told: list[dict[str, object]] = []
        self._changed = asyncio.Event()

    def _note(self, name: str, event: dict[str, object]) -> None:
        self.told.append(event)
        self._changed.set()

    async def until(self, kind: str, times: int = 1) -> dict[str, object]:
        """The last one of so many."""
        async with asyncio.timeout(WAIT_S):
            while len(found := [event for event in self.told if event["event"] == kind]) < times:
                self._changed.clear()
                await self._changed.wait()
        return found[times - 1]


@asynccontextmanager
async def _running(still_s: float, times: ChildTimes = TIMES) -> AsyncIterator[Watched]:
    watched = Watched(still_s, times)
    task = asyncio.create_task(watched.child.run())
    try:
        await watched.until("ready")
        yield watched
    finally:
        task.cancel()
        await asyncio.wait((task,))


@pytest.mark.slow
async def test_a_loop_that_is_busy_for_less_than_the_patience_goes_on() -> None:
    async with _running(0.6) as watched:
        await watched.until("round", 4)
        assert watched.child.num_restarts == 0


@pytest.mark.slow
async def test_a_loop_that_stands_still_for_longer_is_started_again() -> None:
    async with _running(600.0) as watched:
        assert "event loop has stood still" in str((await watched.until("restart"))["reason"])
        await watched.until("ready", 2)


@pytest.mark.slow
async def test_a_process_that_is_stopped_is_started_again() -> None:
    async with _running(0.1) as watched:
        assert watched.child.pid is not None
        os.kill(watched.child.pid, signal.SIGSTOP)
        assert "no sign of life" in str((await watched.until("restart"))["reason"])
        await watched.until("ready", 2)


async def test_a_start_for_which_the_system_has_no_room_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that ended a worker, or the processes that a machine allows, may be had again a moment later."""
    spawn, refusals = asyncio.create_subprocess_exec, 2

    async def refuse(*args: Any, **options: Any) -> asyncio.subprocess.Process:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return await spawn(*args, **options)

    async with _running(0.1) as watched:
        monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
        watched.child.kill()
        await watched.until("ready", 2)
        reasons = [str(event["reason"]) for event in watched.told if event["event"] == "restart"]
        assert reasons[0] == "ended by SIGKILL" and len(reasons) == 3
        assert all("could not be started: " in reason for reason in reasons[1:])


async def test_what_never_starts_for_want_of_room_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*args: Any, **options: Any) -> asyncio.subprocess.Process:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
    with pytest.raises(WorkerLost, match=r"3 times: could not be started: .*Cannot allocate memory"):
        await Watched(0.1, TIMES).child.run()


def test_a_router_gets_more_patience_than_a_worker() -> None:
    times = ChildTimes()
    assert times.hang_after_s == 3.0 < times.router_hang_after_s == 10.0
