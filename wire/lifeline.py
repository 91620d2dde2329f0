"""A socket pair between the launcher and each child: the child reports over it, and dies when it closes.

    child     ready | beat | progress | failed | broke | reloaded             ->   launcher
    a router  pools | blameless | restart_all | load | scale | hold, too      ->   launcher
    launcher  reload | stderr | stopping                                      ->   child
    launcher  fleet | load | drain                                            ->   a router
    launcher ends, in whatever way                                            ->   end of file: the child ends at once

A beat may say how long the child's event loop has not moved: `beat_with` lets the lifeline's own thread tell that, so
that a loop that is held up is not taken for a process that hangs.

One packet is one event, a JSON object whose "event" says what it is. A kernel closes the sockets of a process that
got SIGKILL too, so no child outlives its launcher. Events are small and few; one that does not fit is dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Mapping

from ..common.clock import SystemClock

MAX_EVENT_BYTES = 65536  # a router with a thousand workers names them all
_LOST_EXIT_CODE = 70
_MAX_UNHEARD = 16
_STDERR = 2
BEAT_S = 0.5

Event = Mapping[str, object]


def lifeline_pair() -> tuple[socket.socket, socket.socket]:
    """Make the launcher's end (non-blocking) and the child's, whose descriptor the child inherits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def decode_event(packet: bytes) -> dict[str, object] | None:
    """Return the event in a packet, None if it is none."""
    try:
        event = json.loads(packet)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


class Lifeline:
    """The child's end. Thread-safe; no method blocks or raises for a launcher that is gone."""

    def __init__(
        self, sock: socket.socket, *, on_lost: Callable[[], None] | None = None, stderr_fd: int | None = None
    ) -> None:
        """`on_lost` runs on a thread of its own when the launcher has ended; by default it ends the process.

        `stderr_fd`: what standard error becomes when the launcher says so.
        """
        self._sock = sock
        self._stderr_fd = stderr_fd
        self._on_event: Callable[[dict[str, object]], None] | None = None
        self._unheard: list[dict[str, object]] = []  # what came before anybody listened
        self._listening = threading.Lock()
        self._lag_s: Callable[[], float] | None = None
        self._on_lost = on_lost or _end_process
        self._clock = SystemClock()
        threading.Thread(target=self._run, name="lifeline", daemon=True).start()

    @classmethod
    def from_fds(cls, fd: int | None, stderr_fd: int | None) -> Lifeline | None:
        """Open the lifeline that the launcher handed down; None where there is no launcher."""
        if fd is None:
            return None
        for own in (fd, stderr_fd):  # a grandchild that held it would hide our end from the launcher
            if own is not None:
                os.set_inheritable(own, False)
        return cls(socket.socket(fileno=fd), stderr_fd=stderr_fd)

    def send(self, event: Event) -> None:
        packet = json.dumps(event, default=str).encode()
        if len(packet) > MAX_EVENT_BYTES:
            packet = json.dumps({"event": event["event"], "error": str(event.get("error", ""))[:4096]}).encode()
        with contextlib.suppress(OSError):  # full: the launcher is stopped; closed: the thread below acts
            self._sock.send(packet, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def listen(self, on_event: Callable[[dict[str, object]], None]) -> None:
        """Call `on_event`, on the lifeline's thread, with all that the launcher says and has said, one by one."""
        with self._listening:
            self._on_event = on_event
            for event in self._unheard:
                on_event(event)
            self._unheard.clear()

    def ready(self, **details: object) -> None:
        """Say that the process serves. From here on it must beat."""
        self.send({"event": "ready", **details})

    def beat(self) -> None:
        self.send({"event": "beat"})

    def beat_with(self, lag_s: Callable[[], float]) -> None:
        """Begin to beat on the lifeline's thread, each time with what `lag_s` says there (seconds)."""
        self._lag_s = lag_s

    def progress(self, what: str, fraction: float) -> None:
        self.send({"event": "progress", "what": what, "fraction": fraction})

    def failed(self, error: str) -> None:
        """Say that the process ends because of `error`, which a restart would meet again."""
        self.send({"event": "failed", "error": error})

    def broke(self, error: str) -> None:
        """Say that the process ends because of `error`, which a restart need not meet."""
        self.send({"event": "broke", "error": error})

    def _run(self) -> None:
        self._serve_until_lost()
        self._on_lost()

    def _serve_until_lost(self) -> None:
        with self._sock, contextlib.suppress(OSError):
            readable = select.poll()
            readable.register(self._sock, select.POLLIN)
            while True:
                due_s = self._clock.now() + BEAT_S
                while readable.poll(max(0.0, due_s - self._clock.now()) * 1000):
                    if not (packet := self._sock.recv(MAX_EVENT_BYTES)):
                        return
                    self._hear(decode_event(packet))
                if self._lag_s is not None:
                    self.send({"event": "beat", "lag_s": self._lag_s()})

    def _hear(self, event: dict[str, object] | None) -> None:
        if event is not None and event["event"] == "stderr":
            self._take_stderr()
            return
        with self._listening:
            if event is not None and self._on_event is not None:
                self._on_event(event)
            elif event is not None:
                self._unheard = [*self._unheard[-_MAX_UNHEARD:], event]

    def _take_stderr(self) -> None:
        if self._stderr_fd is not None:
            os.dup2(self._stderr_fd, _STDERR)
            os.close(self._stderr_fd)
            self._stderr_fd = None


def _end_process() -> None:
    if os.getpgid(0) == os.getpid():  # as the launcher starts us: what we started goes too
        os.killpg(0, signal.SIGKILL)
    os._exit(_LOST_EXIT_CODE)
