"""A reload reaches processes that are just starting, and each has its own answer."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvferry.common.clock import SystemClock
from kvferry.launch import reload as reload_module
from kvferry.launch.child_process import Command
from kvferry.launch.process import Child, ChildState
from kvferry.launch.reload import Reload

WAIT_S = 60.0
# Is ready once it has heard of a reload, or, with "ready", at once. As soon as it has heard so many, it answers all of
# them in turn; the last of them fails.
PROGRAM = """
import sys, threading
from kvferry.wire.lifeline import Lifeline

waiting, num_at_once = [], int(sys.argv[2])

def hear(event):
    if event["event"] == "reload":
        lifeline.ready()
        waiting.append(event["number"])
        if len(waiting) == num_at_once:
            for number in waiting:
                error = "the file is gone" if number == event["number"] else ""
                lifeline.send({"event": "reloaded", "number": number, "error": error})
            waiting.clear()

lifeline = Lifeline.from_fds(int(sys.argv[-1]), None)
lifeline.beat_with(lambda: 0.0)
lifeline.listen(hear)
if sys.argv[1] == "ready":
    lifeline.ready()
threading.Event().wait()
"""


@asynccontextmanager
async def running(reload: Reload, word: str, num_at_once: int = 1) -> AsyncIterator[Child]:
    """A child whose process is there."""
    has_started = asyncio.Event()

    def on_event(name: str, event: dict[str, object]) -> None:
        reload.on_event(name, event)
        has_started.set()

    command = Command((sys.executable, "-c", PROGRAM, word, str(num_at_once)), os.environ)
    child = Child("it", lambda: command, SystemClock(), on_event=on_event)
    task = asyncio.create_task(child.run())
    try:
        await has_started.wait()
        yield child
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def test_a_process_that_starts_hears_of_a_reload_and_is_not_waited_for() -> None:
    reload = Reload()
    async with asyncio.timeout(WAIT_S), running(reload, "starts") as child:
        assert child.state is ChildState.STARTING
        assert await reload.ask([child]) == []
        await child.was_ready.wait()  # the program is so when it has heard


async def test_two_reloads_at_once_have_an_answer_each() -> None:
    reload = Reload()
    async with asyncio.timeout(WAIT_S), running(reload, "ready") as child:
        await child.was_ready.wait()
        first, second = await asyncio.gather(reload.ask([child]), reload.ask([child]))
        assert first == second == ["it: the file is gone"]


async def test_an_answer_that_comes_too_late_is_not_taken_for_that_of_the_next_reload(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It says of files that have changed since."""
    reload = Reload()
    async with asyncio.timeout(WAIT_S), running(reload, "ready", num_at_once=2) as child:
        await child.was_ready.wait()
        with monkeypatch.context() as patch:
            patch.setattr(reload_module, "_ANSWER_S", 0.1)
            assert await reload.ask([child]) == ["it: no answer"]
        assert await reload.ask([child]) == ["it: the file is gone"]
