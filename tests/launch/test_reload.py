"""A reload reaches processes that are just starting, and two at once have an answer each."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvferry.common.clock import SystemClock
from kvferry.launch.child_process import Command
from kvferry.launch.process import Child, ChildState
from kvferry.launch.reload import Reload

WAIT_S = 60.0
# Is ready once it has heard of a reload, or, with an argument, at once; then it fails every one.
PROGRAM = """
import sys, threading
from kvferry.common.lifeline import Lifeline

def hear(event):
    if event["event"] == "reload":
        lifeline.ready()
        lifeline.send({"event": "reloaded", "error": "the file is gone"})

lifeline = Lifeline.from_fds(int(sys.argv[-1]), None)
lifeline.beat_with(lambda: 0.0)
lifeline.listen(hear)
if sys.argv[1] == "ready":
    lifeline.ready()
threading.Event().wait()
"""


@asynccontextmanager
async def running(reload: Reload, *words: str) -> AsyncIterator[Child]:
    """A child whose process is there."""
    has_started = asyncio.Event()

    def on_event(name: str, event: dict[str, object]) -> None:
        reload.on_event(name, event)
        has_started.set()

    command = Command((sys.executable, "-c", PROGRAM, *words), os.environ)
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
    async with asyncio.timeout(WAIT_S), running(reload) as child:
        assert child.state is ChildState.STARTING
        assert await reload.ask([child]) == []
        await child.was_ready.wait()  # the program is so when it has heard


async def test_two_reloads_at_once_have_an_answer_each() -> None:
    reload = Reload()
    async with asyncio.timeout(WAIT_S), running(reload, "ready") as child:
        await child.was_ready.wait()
        first, second = await asyncio.gather(reload.ask([child]), reload.ask([child]))
        assert first == second == ["it: the file is gone"]
