"""Keeps one child process running.

    start -> STARTING -> (ready) -> READY -> (exit, or hung: SIGKILL) -> WAITING -> start
      hung: no beat for `hang_after_s`, or beats that say that its event loop has not moved for so long
      STARTING -> (no room for another process) -> WAITING
      STARTING -> (failed, or three exits in a row before it was ever ready)  -> the start-up error is raised
      READY -> (`restart`) SIGTERM: it drains -> exit -> start at once
      any -> (`retire`) SIGTERM: it drains -> exit -> ENDED
      any -> (cancelled) SIGINT, or SIGTERM where it shall drain; grace, SIGKILL -> ENDED

A child that ends within seconds of its start, again and again, waits longer each time; one that had served for a
while comes back at once, and so does one whose end was another's fault (`excuse`). A single run is in child_process.py.
What the child does is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from ..common.clock import Clock
from ..common.errors import ConfigError, WorkerLost
from ..wire.lifeline import Event
from .child_process import ChildProcess, Command, running, within

_TICK_S = 0.25
MAX_START_FAILURES = 3  # of one that was never ready
_EXCUSE_S = 0.5  # of a pause before it is told: in which a router, busy or not, says that a request was to blame


class ChildState(Enum):
    STARTING = "starting"  # the program runs and loads
    READY = "ready"  # it said so, and beats
    WAITING = "waiting"  # it ended; the next start is due after the back-off
    ENDED = "ended"  # stopped for good


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
        self.is_recovering = False  # the next life takes the place of one that served and ended unasked
        # Where the next life writes until `show_stderr`; None: where this process does.
        self.stderr_fd: int | None = None
        self.was_ready = asyncio.Event()
        self.ready_event: dict[str, object] = {}
        self._command = command
        self._clock = clock
        self._times = times or ChildTimes()
        self._on_event = on_event
        self._process: ChildProcess | None = None  # of this life, or of the last one until the next begins
        self._num_failures = 0
        self._hurry = asyncio.Event()  # the next life is not waited for
        self._drains_until: float | None = None  # asked to end, and to be started again
        self._comes_back: asyncio.Future[bool] | None = None  # somebody waits for the next life
        self._retired = asyncio.Event()  # this life is the last one

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def run(self) -> None:
        """Keep the process running until cancelled or retired; then its group is gone. Raises if it cannot start."""
        try:
            while not self._retired.is_set():
                reason = await self._live()
                if self._retired.is_set():
                    return
                self.is_recovering = self.was_ready.is_set() and self._drains_until is None
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
        is_hurried = await within(seconds, self._hurry.wait())
        self._num_failures -= is_hurried
        return is_hurried

    async def restart(self, drain_s: float | None = None) -> bool:
        """Let this life end in good order and the next begin; whether that one became ready. One call at a time.

        A child that is not up is waited for only. After `drain_s` what it still does is given up.
        """
        assert self._comes_back is None
        self._comes_back = asyncio.get_running_loop().create_future()
        try:
            if self.state is ChildState.READY and self._process is not None:
                self._drains_until = self._clock.now() + self._times.drain_s
                self._signal(signal.SIGTERM)
                if drain_s is not None and not await within(drain_s, self._process.wait()):
                    self._signal(signal.SIGINT)  # the second ends it at once
            return await self._comes_back
        finally:
            self._comes_back = None

    def retire(self, *, drains: bool = False) -> None:
        """Let this life end in good order, and start no other: `run` returns. Idempotent.

        `drains`: it was told already, by somebody else and with a limit, which SIGTERM could shorten. One that is not
        up was not: it is the life after that one.
        """
        if not self._retired.is_set():
            self._retired.set()
            self._hurry.set()
            if self._drains_until is None and not (drains and self.state is ChildState.READY):  # else it ends already
                self._drains_until = self._clock.now() + self._times.drain_s
                self._signal(signal.SIGTERM)

    def excuse(self, incarnation: object) -> None:
        """The life that called itself so ends, or has ended, because of what it was asked: the next one need not wait.

        Idempotent; nothing where that life is not the last one.
        """
        if incarnation is not None and self._process is not None and incarnation == self._process.incarnation:
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
        if self._process is not None:
            self._process.send(event)

    def _answer(self, came_back: bool) -> None:
        if self._comes_back is not None and not self._comes_back.done():
            self._comes_back.set_result(came_back)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.signal(number)

    def kill(self) -> None:
        """SIGKILL to the child and whatever it started. Idempotent."""
        if self._process is not None:
            self._process.kill()

    async def _live(self) -> str:
        """One life of the program; why it ended."""
        self.state, self._process = ChildState.STARTING, None
        self._hurry.clear()
        hang_after_s = self._times.hang_after_s
        async with contextlib.AsyncExitStack() as stack:
            life = running(
                self._command(), self._clock, hang_after_s=hang_after_s, on_event=self._take, stderr_fd=self.stderr_fd
            )
            try:
                process = await stack.enter_async_context(life)
            except OSError as error:  # the system has no room for a process or a descriptor: it may have later
                return f"could not be started: {error}"
            self._process = process
            self._tell("started", pid=process.pid)
            if self._retired.is_set():  # while it was being started
                process.signal(signal.SIGTERM)
            try:
                hung = await self._watch(process)
            except asyncio.CancelledError:
                await self._terminate(process)
                raise
        code = await process.wait()
        if hung is not None:
            return hung
        if process.end_error:
            return process.end_error
        if code is None:
            return "ended; who could say how has ended too"
        return f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"

    async def _watch(self, process: ChildProcess) -> str | None:
        """Take events until the child's end closes; text if it hangs."""
        with process.listening():
            looked_at = self._clock.now()
            while not await process.closes_within(_TICK_S):
                now = self._clock.now()
                if now - looked_at > 4 * _TICK_S:
                    process.forgive_silence(now)  # the launcher itself was held up: silence meanwhile proves nothing
                looked_at = now
                if (hung := process.hang(now)) is not None:
                    return hung
                if self._drains_until is not None and now > self._drains_until:
                    return f"did not end within {self._times.drain_s:g} s of SIGTERM"
        has_ended = await within(self._times.hang_after_s, process.wait())
        return None if has_ended else "closed its lifeline and stayed"

    def _take(self, event: dict[str, object]) -> None:
        if event["event"] == "ready":
            self.state, self.ready_event = ChildState.READY, event
            self.was_ready.set()
            self._answer(True)
        is_raised = event["event"] == "failed" and not self.was_ready.is_set()  # by `run`: told once
        if not is_raised:
            self._on_event(self.name, event)

    def _count_failure(self, reason: str) -> float:
        """Seconds until the next start. Raises if it never started at all."""
        self._answer(False)
        process = self._process
        since_s = process.ready_at if process is not None and self.state is ChildState.READY else math.inf
        if self._clock.now() - since_s >= self._times.stable_after_s:
            self._num_failures = 0
            return 0.0
        self._num_failures += 1
        if not self.was_ready.is_set():
            if process is not None and process.start_error is not None:
                raise ConfigError(f"{self.name}: {process.start_error}")
            if self._num_failures >= MAX_START_FAILURES:
                raise WorkerLost(f"{self.name} did not start, {self._num_failures} times: {reason}")
        return self._times.backoff_s(self._num_failures)

    async def _terminate(self, process: ChildProcess) -> None:
        """Let it end by itself; what is there yet after that time is killed as `running` ends."""
        if not self.shall_drain or self._drains_until is None:  # else it drains already: asked twice, it would stop
            process.signal(signal.SIGTERM if self.shall_drain else signal.SIGINT)
        await within(self._times.drain_s if self.shall_drain else self._times.grace_s, process.wait())

    def _tell(self, what: str, **details: object) -> None:
        self._on_event(self.name, {"event": what, **details})
