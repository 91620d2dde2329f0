"""A child's lives one after the other, with processes that are made up: what it is told, when, and what follows."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvferry.launch import process
from kvferry.launch.child_process import Command
from kvferry.launch.process import Child, ChildState, ChildTimes
from kvferry.wire.lifeline import Event

from ..fake_clock import FakeClock

TERM, INT = signal.SIGTERM, signal.SIGINT
TIMES = ChildTimes(first_backoff_s=1000.0, max_backoff_s=1e6, stable_after_s=60.0)


class Life:
    """A process that ends when it is told to by a test."""

    pid = 1
    start_error = end_error = None
    incarnation: object = None

    def __init__(self, now: float, on_event: Callable[[dict[str, object]], None]) -> None:
        self.ready_at = now
        self.on_event = on_event
        self.signals: list[signal.Signals] = []
        self.heard: list[Event] = []
        self.num_forgiven = 0
        self.is_left = False  # nobody listens to it any more
        self.is_closed = False  # its end of the lifeline, while it stays
        self.code: int | None = 0
        self._end = asyncio.Event()

    def end(self, code: int | None = 0) -> None:
        self.code = code
        self._end.set()

    async def wait(self) -> int | None:
        await self._end.wait()
        return self.code

    async def closes_within(self, seconds: float) -> bool:
        await asyncio.sleep(0)
        return self.is_closed or self._end.is_set()

    def signal(self, number: signal.Signals) -> None:
        self.signals.append(number)

    def send(self, event: Event) -> None:
        self.heard.append(event)

    def kill(self) -> None:
        self.signals.append(signal.SIGKILL)
        self.end(-signal.SIGKILL)

    def hang(self, now: float) -> None:
        return None

    def forgive_silence(self, now: float) -> None:
        self.num_forgiven += 1

    def listening(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Watched:
    """A child, its lives, and what it told."""

    def __init__(self, times: ChildTimes) -> None:
        self.clock = FakeClock()
        self.lives: list[Life] = []
        self.told: list[dict[str, object]] = []
        self.stderr_fds: list[object] = []  # of each life
        self.on_start: Callable[[], None] = lambda: None
        self.on_leave: Callable[[], None] = lambda: None
        command = Command(("it",), {})
        self.child = Child("it", lambda: command, self.clock, times=times, on_event=lambda _, e: self.told.append(e))
        self.task = asyncio.ensure_future(self.child.run())

    @asynccontextmanager
    async def life(
        self, *_: object, on_event: Callable[[dict[str, object]], None], stderr_fd: int | None, **__: object
    ) -> AsyncIterator[Any]:
        self.stderr_fds.append(stderr_fd)
        self.lives.append(Life(self.clock.now(), on_event))
        self.on_start()
        try:
            yield (life := self.lives[-1])
        finally:
            life.is_left = True
            self.on_leave()

    async def turn(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def ready(self) -> Life:
        """Let the life that starts be ready."""
        await self.turn()
        self.lives[-1].on_event({"event": "ready"})
        return self.lives[-1]

    async def ends(self, code: int | None = 0) -> None:
        self.lives[-1].end(code)
        await self.turn()

    def restarts(self) -> list[tuple[object, object]]:
        return [(event["reason"], event["delay_s"]) for event in self.told if event["event"] == "restart"]


@asynccontextmanager
async def watched(monkeypatch: pytest.MonkeyPatch, times: ChildTimes = TIMES) -> AsyncIterator[Watched]:
    made = Watched(times)
    monkeypatch.setattr(process, "running", made.life)
    monkeypatch.setattr(process, "_EXCUSE_S", 0.0)
    yield made
    made.task.cancel()
    await made.turn()
    made.lives[-1].end()
    await asyncio.wait((made.task,))
    assert made.child.state is ChildState.ENDED


async def test_who_is_restarted_drains_and_comes_back_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(monkeypatch) as it:
        first = await it.ready()
        endings = [it.child.is_ending]
        restart = asyncio.ensure_future(it.child.restart())
        await it.turn()
        endings.append(it.child.is_ending)
        assert first.signals == [TERM]
        await it.ends()
        assert [*endings, it.child.is_ending] == [False, True, False]
        assert (it.child.state, it.child.is_recovering, len(it.lives)) == (ChildState.STARTING, False, 2)
        assert not restart.done()
        await it.ready()
        assert await restart and it.restarts() == [("exit code 0", 0.0)]
        await it.ends(3)
        assert (it.child.state, it.child.is_recovering) == (ChildState.WAITING, True)
        assert it.restarts()[1:] == [("exit code 3", 1000.0)]  # unasked, and soon after its start


async def test_a_drain_that_lasts_is_cut_short_and_in_the_end_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(monkeypatch) as it:
        life = await it.ready()
        restart = asyncio.ensure_future(it.child.restart(drain_s=0.01))
        async with asyncio.timeout(10.0):
            while life.signals != [TERM, INT]:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        for seconds, is_left in ((TIMES.drain_s, False), (0.1, True)):
            it.clock.advance(seconds)
            await it.turn()
            assert life.is_left == is_left
        life.end(-signal.SIGKILL)  # as `running` sees to
        await it.turn()
        assert it.restarts() == [("did not end within 40 s of SIGTERM", 0.0)]
        restart.cancel()


async def test_who_is_not_up_is_waited_for_alone_and_may_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(monkeypatch) as it:
        for comes in (True, False):
            await it.turn()
            restart = asyncio.ensure_future(it.child.restart())
            await it.turn()
            assert not it.lives[-1].signals
            await (it.ready() if comes else it.ends(3))
            assert await restart is comes
            if comes:
                it.clock.advance(TIMES.stable_after_s)  # it served: its end is no failure
                await it.ends(3)
        assert it.restarts() == [("exit code 3", 0.0), ("exit code 3", 1000.0)]


@pytest.mark.parametrize("drains", [False, True])
async def test_who_is_retired_gets_one_signal_and_has_no_next_life(
    drains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, if somebody else has told it, and none but the first where it is being restarted."""
    async with watched(monkeypatch) as it:
        life = await it.ready()
        it.child.retire(drains=drains)
        it.child.retire()
        assert life.signals == ([] if drains else [TERM])
        for seconds, is_left in ((TIMES.drain_s, False), (0.1, not drains)):
            it.clock.advance(seconds)
            await it.turn()
            assert life.is_left == is_left
        await it.ends()
        assert it.task.done() and not it.restarts()
    async with watched(monkeypatch) as it:
        life = await it.ready()
        restart = asyncio.ensure_future(it.child.restart())
        await it.turn()
        it.child.retire(drains=drains)
        assert life.signals == [TERM]
        await it.ends()
        assert it.task.done() and not await restart


async def test_who_is_retired_in_a_pause_or_while_it_is_started_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(monkeypatch) as it:
        await it.ready()
        await it.ends(3)
        assert it.child.state is ChildState.WAITING
        it.child.retire()
        await it.turn()
        assert it.task.done() and len(it.lives) == 1
    async with watched(monkeypatch) as it:
        it.on_start = it.child.retire
        await it.turn()
        assert it.lives[0].signals == [TERM]


async def test_who_starts_after_a_life_that_drained_is_retired_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What drained has ended before the launcher hears that it shall not come back."""
    async with watched(monkeypatch) as it:
        await it.ready()
        it.clock.advance(TIMES.stable_after_s)
        await it.ends()
        it.child.retire(drains=True)
        assert it.lives[1].signals == [TERM]
        await it.ends()
        assert it.task.done() and len(it.lives) == 2


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("drains", [False, True])
async def test_at_the_end_of_all_it_drains_if_it_shall_and_is_told_once(
    is_restarted: bool, drains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that shall end at once is told so, although it drains."""
    async with watched(monkeypatch) as it:
        life = await it.ready()
        restart = asyncio.ensure_future(it.child.restart()) if is_restarted else None
        await it.turn()
        it.child.shall_drain = drains
        it.task.cancel()
        await it.turn()
        assert life.signals == ([TERM] if drains else [TERM, INT] if is_restarted else [INT])
        await it.ends()
        assert restart is None or not await restart


@pytest.mark.parametrize("drains", [False, True])
async def test_at_the_end_of_all_one_that_drains_has_more_time(drains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(monkeypatch, ChildTimes(grace_s=0.0, drain_s=1000.0)) as it:
        life = await it.ready()
        it.child.shall_drain = drains
        it.task.cancel()
        await it.turn()
        assert life.is_left != drains


async def test_a_start_that_fails_is_told_by_who_began_it_and_later_ones_by_the_child(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with watched(monkeypatch) as it:
        await it.turn()
        failed: dict[str, object] = {"event": "failed", "error": "no such model"}
        for num_told in (0, 1):
            it.lives[-1].on_event(failed)
            assert it.told.count(failed) == num_told
            await it.ready()


async def test_whose_end_was_anothers_fault_starts_at_once_and_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(monkeypatch) as it:
        for number in range(1, 4):
            life = await it.ready()
            it.child.excuse(None)
            life.incarnation = number
            if number == 1:  # it is told before the end is seen, or in the pause
                it.child.excuse(number)
            await it.ends(3)
            if number > 1:
                it.child.excuse(number - 1)
                await it.turn()
                assert it.child.state is ChildState.WAITING
                it.child.excuse(number)
                await it.turn()
            assert it.child.num_restarts == number == len(it.lives) - 1
        assert [delay_s for _, delay_s in it.restarts()] == [0.0, 1000.0, 1000.0]


async def test_who_leaves_its_lifeline_and_stays_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    started = asyncio.Event()
    async with watched(monkeypatch, ChildTimes(hang_after_s=0.01, first_backoff_s=0.0)) as it:
        life = await it.ready()
        it.on_leave = lambda: life.end(-signal.SIGKILL)  # as `running` sees to
        it.on_start = started.set
        life.is_closed = True
        await asyncio.wait_for(started.wait(), 60.0)
        assert it.restarts() == [("closed its lifeline and stayed", 0.0)]


async def test_an_end_that_nobody_saw_is_one_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(monkeypatch) as it:
        await it.ready()
        await it.ends(None)
        assert it.restarts() == [("ended; who could say how has ended too", 1000.0)]


async def test_between_two_lives_there_is_no_process_to_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of the last one may be another's by then."""
    pids: list[int | None] = []
    async with watched(monkeypatch) as it:
        it.on_start = lambda: pids.append(it.child.pid)
        await it.ready()
        it.clock.advance(TIMES.stable_after_s)
        await it.ends()
        assert len(it.lives) == 2 and pids == [None, None]


async def test_who_asked_for_a_restart_may_leave_as_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(monkeypatch) as it:
        await it.ready()
        restart = asyncio.ensure_future(it.child.restart())
        await it.turn()
        await it.ends()
        restart.cancel()
        it.lives[-1].on_event({"event": "ready"})
        assert it.child.state is ChildState.READY
        await it.turn()
        assert restart.cancelled()


async def test_only_ends_soon_after_a_start_count_and_only_who_had_served_recovers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with watched(monkeypatch, ChildTimes(first_backoff_s=1e-9, stable_after_s=60.0)) as it:
        await it.turn()
        await it.ends(3)
        recovers = [it.child.is_recovering]
        for serves_s in (0.0, 0.0, 0.0, 60.0, 0.0):
            await it.ready()
            it.clock.advance(serves_s)
            await it.ends(3)
            recovers.append(it.child.is_recovering)
        assert [delay_s for _, delay_s in it.restarts()] == [1e-9, 2e-9, 4e-9, 8e-9, 0.0, 1e-9]
        assert recovers == [False, True, True, True, True, True]


async def test_what_it_writes_is_kept_apart_until_it_shall_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(monkeypatch) as it:
        it.child.stderr_fd = 7
        life = await it.ready()
        it.child.show_stderr()
        assert life.heard == [{"event": "stderr"}]
        it.clock.advance(TIMES.stable_after_s)
        await it.ends(3)
        assert it.stderr_fds == [7, None]


async def test_silence_while_the_launcher_stood_still_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(monkeypatch) as it:
        life = await it.ready()
        for seconds, num_forgiven in ((1.0, 0), (1.1, 1)):
            it.clock.advance(seconds)
            await it.turn()
            assert life.num_forgiven == num_forgiven
