"""Keeps one child process running.

    start -> STARTING -> (ready) -> READY -> (exit, or hung: SIGKILL) -> WAITING -> start
      hung: no beat for `hang_after_s`, or beats that say that its event loop has not moved for so long
      STARTING -> (failed, or three exits in a row before it was ever ready)  -> the start-up error is raised
      READY -> (`restart`) SIGTERM: it drains -> exit -> start at once
      any -> (`retire`) SIGTERM: it drains -> exit -> ENDED
      any -> (cancelled) SIGINT, or SIGTERM where it shall drain; grace, SIGKILL -> ENDED

A child that ends within seconds of its start, again and again, waits longer each time; one that had served for a
while comes back at once, and so does one whose end was another's fault (`excuse`). Each child leads a session of its
own: Ctrl-C reaches the launcher alone, and a child's own children end with it. What the child does is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from ..common.clock import Clock
from ..common.errors import ConfigError, KVFerryError, WorkerLost
from ..common.lifeline import MAX_EVENT_BYTES, Event, decode_event, lifeline_pair

_TICK_S = 0.25
_MAX_START_FAILURES = 3
_STDERR = 2
_EXCUSE_S = 0.5  # of a pause before it is told: in which a router, busy or not, says that a request was to blame


class ChildState(Enum):
    STARTING = "starting"  # the program runs and loads
    READY = "ready"  # it said so, and beats
    WAITING = "waiting"  # it ended; the next start is due after the back-off
    ENDED = "ended"  # stopped for good


class Command(NamedTuple):
    argv: tuple[str, ...]
    env: Mapping[str, str]
    fds: tuple[int, ...] = ()  # the child inherits them under the same numbers


@dataclass(frozen=True, slots=True)
class ChildTimes:
    """A launcher's patience with its children (seconds)."""

    hang_after_s: float = 3.0  # without a beat, or with a loop that stands still, once ready
    router_hang_after_s: float = 10.0  # a router gets more time than a worker: its end costs every stream that it holds
    grace_s: float = 5.0  # between SIGINT and SIGKILL
    drain_s: float = 40.0  # between SIGTERM and SIGKILL: longer than a child's own limit
    first_backoff_s: float = 0.5
    max_backoff_s: float = 30.0
    stable_after_s: float = 2.0  # one that served so long did not fail at its start: it comes back at once

    def backoff_s(self, num_failures: int) -> float:
        """The pause after the `num_failures`-th end in a row, 1 being the first."""
        return float(min(self.max_backoff_s, self.first_backoff_s * 2 ** min(num_failures - 1, 30)))


class Child:
    """One program under supervision. `run` owns the process; the rest may be called from its loop at any time."""

    def __init__(
        self,
        name: str,
        command: Callable[[], Command],
        clock: Clock,
        *,
        times: ChildTimes | None = None,
        on_event: Callable[[str, dict[str, object]], None] = lambda name, event: None,
    ) -> None:
        self.name = name
        self.state = ChildState.STARTING
        self.num_restarts = 0
        self.shall_drain = False  # when `run` is cancelled
        self.stderr_fd: int | None = (
            None  # where the next life writes until `show_stderr`; None: where this process does
        )
        self.was_ready = asyncio.Event()
        self.ready_event: dict[str, object] = {}
        self._command = command
        self._clock = clock
        self._times = times or ChildTimes()
        self._on_event = on_event
        self._process: asyncio.subprocess.Process | None = None
        self._num_failures = 0
        self._ready_at = 0.0
        self._incarnation: object = None  # what it called this life when it was ready
        self._hurry = asyncio.Event()  # the next life is not waited for
        self._heard_at = 0.0
        self._lag_s = 0.0  # of its event loop, as it said last
        self._start_error: str | None = None
        self._drains_until: float | None = None  # asked to end, and to be started again
        self._comes_back: asyncio.Future[bool] | None = None  # somebody waits for the next life
        self._retired = asyncio.Event()  # this life is the last one
        self._lifeline: socket.socket | None = None  # our end, while a life lasts

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def run(self) -> None:
        """Keep the process running until cancelled or retired; then its session is gone. Raises if it cannot start."""
        try:
            while not self._retired.is_set():
                reason = await self._live()
                if self._retired.is_set():
                    return
                delay_s = 0.0 if self._drains_until is not None else self._count_failure(reason)
                self.state, self._drains_until = ChildState.WAITING, None
                if delay_s and await self._is_hurried(min(delay_s, _EXCUSE_S)):
                    delay_s = 0.0
                self._tell("restart", reason=reason, delay_s=delay_s)
                if delay_s > _EXCUSE_S:
                    await self._is_hurried(delay_s - _EXCUSE_S)
                self.num_restarts += 1
        finally:
            self.state = ChildState.ENDED
            self._answer(False)

    async def _is_hurried(self, seconds: float) -> bool:
        """Pause for so long, or until the next life is not to wait: then the failure before it does not count."""
        is_hurried = await _within(seconds, self._hurry.wait())
        self._num_failures -= is_hurried
        return is_hurried

    async def restart(self, drain_s: float | None = None) -> bool:
        """Let this life end in good order and the next begin; whether that one became ready. One call at a time.

        A child that is not up is waited for only. After `drain_s` what it still does is given up.
        """
        assert self._comes_back is None
        self._comes_back = asyncio.get_running_loop().create_future()
        try:
            if self.state is ChildState.READY:
                self._drains_until = self._clock.now() + self._times.drain_s
                self._signal(signal.SIGTERM)
                if drain_s is not None and not await _within(drain_s, self._ended()):
                    self._signal(signal.SIGTERM)  # the second ends it at once
            return await self._comes_back
        finally:
            self._comes_back = None

    def retire(self, *, drains: bool = False) -> None:
        """Let this life end in good order, and start no other: `run` returns. Idempotent.

        `drains`: it was told already, by somebody else and with a limit; a second time would end it at once.
        """
        if not self._retired.is_set():
            self._retired.set()
            self._hurry.set()
            if self._drains_until is None and not drains:  # else it is ending already
                self._drains_until = self._clock.now() + self._times.drain_s
                self._signal(signal.SIGTERM)

    def excuse(self, incarnation: object) -> None:
        """The life that called itself so ends, or has ended, because of what it was asked: the next one need not wait.

        Idempotent; nothing where that life is not the last one.
        """
        if incarnation is not None and incarnation == self._incarnation:
            self._hurry.set()

    @property
    def is_retired(self) -> bool:
        return self._retired.is_set()

    @property
    def is_ending(self) -> bool:
        """Say whether the process was asked to end and has not yet."""
        return self._drains_until is not None and self.state is ChildState.READY

    def show_stderr(self) -> None:
        """Let the child write where this process does, from here on."""
        self.stderr_fd = None
        self.send({"event": "stderr"})

    def send(self, event: Event) -> None:
        """Tell the child. Dropped if there is none, or if it does not read."""
        if self._lifeline is not None:
            with contextlib.suppress(OSError):
                self._lifeline.send(json.dumps(event).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    async def _ended(self) -> None:
        assert self._process is not None
        await self._process.wait()

    def _answer(self, came_back: bool) -> None:
        if self._comes_back is not None and not self._comes_back.done():
            self._comes_back.set_result(came_back)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the child and whatever it started. Idempotent."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _live(self) -> str:
        """One life of the program; why it ended."""
        ours, theirs = lifeline_pair()
        with ours:
            with theirs:
                await self._start(theirs)
            assert self._process is not None
            self._lifeline = ours
            if self._retired.is_set():  # while it was being started
                self._signal(signal.SIGTERM)
            try:
                hung = await self._listen(ours)
            except asyncio.CancelledError:
                await self._terminate()
                raise
            finally:
                self._lifeline = None
                self.kill()
        code = await self._process.wait()
        if hung is not None:
            return hung
        return f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"

    async def _start(self, theirs: socket.socket) -> None:
        command = self._command()
        self.state, self._start_error = ChildState.STARTING, None
        self._heard_at, self._lag_s = self._clock.now(), 0.0
        self._incarnation = None
        self._hurry.clear()
        argv, fds = [*command.argv, "--lifeline-fd", str(theirs.fileno())], [theirs.fileno(), *command.fds]
        with contextlib.ExitStack() as stack:
            if self.stderr_fd is not None:
                fds.append(shown := os.dup(_STDERR))
                stack.callback(os.close, shown)
                argv += ["--stderr-fd", str(shown)]
            self._process = await asyncio.create_subprocess_exec(
                *argv,
                env=dict(command.env),
                stdin=asyncio.subprocess.DEVNULL,
                stderr=self.stderr_fd,
                pass_fds=fds,
                start_new_session=True,
            )
        self._tell("started", pid=self._process.pid)

    async def _listen(self, ours: socket.socket) -> str | None:
        """Take events until the child's end closes; text if it hangs."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(ours, self._read, ours, ended)
        try:
            looked_at = self._clock.now()
            while not await _within(_TICK_S, ended.wait()):
                now = self._clock.now()
                if now - looked_at > 4 * _TICK_S:
                    self._heard_at = now  # the launcher itself was held up: silence meanwhile proves nothing
                looked_at = now
                if (hung := self._hang(now)) is not None:
                    return hung
                if self._drains_until is not None and now > self._drains_until:
                    return f"did not end within {self._times.drain_s:g} s of SIGTERM"
        finally:
            loop.remove_reader(ours)
        assert self._process is not None
        gone = await _within(self._times.hang_after_s, self._process.wait())
        return None if gone else "closed its lifeline and stayed"

    def _hang(self, now: float) -> str | None:
        if self.state is not ChildState.READY:
            return None
        if now - self._heard_at > self._times.hang_after_s:
            return f"no sign of life for {now - self._heard_at:.1f} s"
        if self._lag_s > self._times.hang_after_s:
            return f"its event loop has stood still for {self._lag_s:.1f} s"
        return None

    def _read(self, ours: socket.socket, ended: asyncio.Event) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                while packet := ours.recv(MAX_EVENT_BYTES):
                    self._take(packet, self._clock.now())
            except ConnectionError:
                pass
            ended.set()

    def _take(self, packet: bytes, now: float) -> None:
        event = decode_event(packet)
        if event is None:
            return
        self._heard_at = now
        lag_s = event.get("lag_s", 0.0)
        self._lag_s = lag_s if isinstance(lag_s, int | float) else 0.0
        if event["event"] == "ready":
            self.state, self._ready_at, self.ready_event = ChildState.READY, now, event
            self._incarnation = event.get("incarnation")
            self.was_ready.set()
            self._answer(True)
        elif event["event"] == "failed":
            self._start_error = str(event.get("error", ""))
        is_raised = event["event"] == "failed" and not self.was_ready.is_set()  # by `run`: told once
        if event["event"] != "beat" and not is_raised:
            self._on_event(self.name, event)

    def _count_failure(self, reason: str) -> float:
        """Seconds until the next start. Raises if it never started at all."""
        self._answer(False)
        if self.state is ChildState.READY and self._clock.now() - self._ready_at >= self._times.stable_after_s:
            self._num_failures = 0
            return 0.0
        if self._hurry.is_set():
            return 0.0
        self._num_failures += 1
        if not self.was_ready.is_set():
            if self._start_error is not None:
                raise ConfigError(f"{self.name}: {self._start_error}")
            if self._num_failures >= _MAX_START_FAILURES:
                raise WorkerLost(f"{self.name} did not start, {self._num_failures} times: {reason}")
        return self._times.backoff_s(self._num_failures)

    async def _terminate(self) -> None:
        if not self.shall_drain or self._drains_until is None:  # else it drains already: asked twice, it would stop
            self._signal(signal.SIGTERM if self.shall_drain else signal.SIGINT)
        if not await _within(self._times.drain_s if self.shall_drain else self._times.grace_s, self._ended()):
            self.kill()
            await self._ended()

    def _tell(self, what: str, **details: object) -> None:
        self._on_event(self.name, {"event": what, **details})


async def _within(seconds: float, work: Awaitable[object]) -> bool:
    """Say whether `work` ended in time. Unlike `wait_for` of Python 3.11, never swallows a cancellation."""
    try:
        async with asyncio.timeout(seconds):
            await work
    except TimeoutError:
        return False
    return True


class Stopper:
    """Runs one coroutine until it ends or `stop` is called, and lets it clean up."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        self._stop.set()

    async def run(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            task.cancel()
            await asyncio.wait((task,))
        if not task.cancelled() and (error := task.exception()) is not None:
            raise _first_error(error)


def _first_error(error: BaseException) -> BaseException:
    """Return one error of a task group: one that kvferry raised on purpose if there is any."""
    while isinstance(error, BaseExceptionGroup):
        ours, _ = error.split(KVFerryError)
        error = (ours or error).exceptions[0]
    return error
