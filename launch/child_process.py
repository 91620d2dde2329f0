"""One run of a child program: its process, its lifeline, its signs of life.

    started -> (event "ready") -> is_ready, beats -> lifeline closed -> exited
                                   hung: no beat for so long, or beats that say that its event loop has not moved

It leads a process group of its own: Ctrl-C reaches the launcher alone, and a child's own children end with it. It is
forked where a fork server has its imports, and else started afresh. Whether a run is to end, and whether another
follows, is decided in process.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import MappingProxyType
from typing import NamedTuple, Protocol

from ..common.clock import Clock
from ..wire.lifeline import MAX_EVENT_BYTES, Event, decode_event, lifeline_pair
from .forking import ForkServer

_STDERR = 2
_REAPED_WITHIN_S = 5.0  # after SIGKILL: moments, unless its disk stands still


class Command(NamedTuple):
    argv: tuple[str, ...]
    env: Mapping[str, str]
    fds: Mapping[str, int] = MappingProxyType({})  # descriptors that the child inherits, by the flag that tells it
    name: str = ""  # of the child, for `ps`
    fork_server: ForkServer | None = None  # it may have the imports of the program


class Process(Protocol):
    """A process, in whatever way it was started."""

    @property
    def pid(self) -> int: ...
    def send_signal(self, number: signal.Signals) -> None: ...
    async def wait(self) -> int | None: ...


class ChildProcess:
    """A process that runs, or has ended. Signals to one that has ended are dropped."""

    def __init__(
        self,
        process: Process,
        lifeline: socket.socket,
        clock: Clock,
        hang_after_s: float,
        on_event: Callable[[dict[str, object]], None],
    ) -> None:
        self.pid = process.pid
        self.is_ready = False
        self.ready_at = 0.0
        self.incarnation: object = None  # what it called itself when it was ready
        self.start_error: str | None = None
        self.end_error: str | None = None  # why it ended, where it said so and may be started again
        self._process = process
        self._lifeline: socket.socket | None = lifeline  # our end, while it runs
        self._clock = clock
        self._hang_after_s = hang_after_s
        self._on_event = on_event
        self._closed = asyncio.Event()  # its end of the lifeline
        self._heard_at = clock.now()
        self._lag_s = 0.0  # of its event loop, as it said last

    def send(self, event: Event) -> None:
        """Tell the child. Dropped if it has ended, or if it does not read."""
        if self._lifeline is not None:
            with contextlib.suppress(OSError):
                self._lifeline.send(json.dumps(event).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the child and whatever it started. Idempotent."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def wait(self) -> int | None:
        """Wait until it has exited; returns the exit code, or the signal's number below zero. None: nobody knows."""
        return await self._process.wait()

    async def closes_within(self, seconds: float) -> bool:
        """Wait until its end of the lifeline is closed, for so long at most."""
        return await within(seconds, self._closed.wait())

    def hang(self, now: float) -> str | None:
        """Return how it hangs, if it does."""
        if not self.is_ready:
            return None
        if now - self._heard_at > self._hang_after_s:
            return f"no sign of life for {now - self._heard_at:.1f} s"
        if self._lag_s > self._hang_after_s:
            return f"its event loop has stood still for {self._lag_s:.1f} s"
        return None

    def forgive_silence(self, now: float) -> None:
        """Count its silence from now on: before, nobody listened."""
        self._heard_at = now

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take what the child says, for the length of the block."""
        loop, ours = asyncio.get_running_loop(), self._lifeline
        assert ours is not None
        loop.add_reader(ours, self._read, ours)
        try:
            yield
        finally:
            loop.remove_reader(ours)

    def end(self) -> None:
        """Leave nothing of it running, and say nothing more to it. Idempotent."""
        self._lifeline = None
        self.kill()

    def _read(self, ours: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                while packet := ours.recv(MAX_EVENT_BYTES):
                    self._take(packet, self._clock.now())
            except ConnectionError:
                pass
            self._closed.set()

    def _take(self, packet: bytes, now: float) -> None:
        event = decode_event(packet)
        if event is None:
            return
        self._heard_at = now
        lag_s = event.get("lag_s", 0.0)
        self._lag_s = lag_s if isinstance(lag_s, int | float) else 0.0
        if event["event"] == "ready":
            self.is_ready, self.ready_at, self.incarnation = True, now, event.get("incarnation")
        elif event["event"] == "failed":
            self.start_error = str(event.get("error", ""))
        elif event["event"] == "broke":  # told as the reason of the next start
            self.end_error = str(event.get("error", ""))
        if event["event"] not in ("beat", "broke"):
            self._on_event(event)


@asynccontextmanager
async def running(
    command: Command,
    clock: Clock,
    *,
    hang_after_s: float,
    on_event: Callable[[dict[str, object]], None],
    stderr_fd: int | None = None,
) -> AsyncIterator[ChildProcess]:
    """Start the program; after the block its group is gone. `stderr_fd`: where it writes until told otherwise."""
    ours, theirs = lifeline_pair()
    with ours:
        with theirs:
            process = await _spawn(command, theirs, stderr_fd)
        child = ChildProcess(process, ours, clock, hang_after_s, on_event)
        try:
            yield child
        finally:
            child.end()
            await within(_REAPED_WITHIN_S, child.wait())


async def _spawn(command: Command, theirs: socket.socket, stderr_fd: int | None) -> Process:
    argv, fds, fork_server = command.argv, {"--lifeline-fd": theirs.fileno(), **command.fds}, command.fork_server
    with contextlib.ExitStack() as stack:
        if stderr_fd is not None:
            fds["--stderr-fd"] = os.dup(_STDERR)
            stack.callback(os.close, fds["--stderr-fd"])
        if fork_server is not None and fork_server.can_start(argv):
            return await fork_server.start(argv, fds, command.env, stderr_fd, title=f"{argv[2]} {command.name}")
        return await asyncio.create_subprocess_exec(
            *argv,
            *(word for flag, fd in fds.items() for word in (flag, str(fd))),
            env=dict(command.env),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=stderr_fd,
            pass_fds=list(fds.values()),
            process_group=0,
        )


async def within(seconds: float, work: Awaitable[object]) -> bool:
    """Say whether `work` ended in time. Unlike `wait_for` of Python 3.11, never swallows a cancellation."""
    try:
        async with asyncio.timeout(seconds):
            await work
    except TimeoutError:
        return False
    return True
