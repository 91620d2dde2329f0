"""Run `python -m kvferry.launch.forking.server FD MODULE...`: the process whose forks are a launcher's children.

    Start ─> what the program imports, if it is not there yet ─> fork ─> the child is `python -m PROGRAM ...`
      │                                                           └─> Started ... the child ends ─> Ended
      └─ while nobody asks: imports of the modules that will be wanted, in their order

A fork has one thread, the one that forks: nothing that is imported here may start another or touch a GPU. The process
ends when its socket is closed, by its launcher's end too, and its last child has ended; these have lifelines of their
own.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import selectors
import signal
import socket
import sys
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from setproctitle import setproctitle

from ...common.imports import ended_by_interrupts, kept_imports
from .messages import MAX_FDS, MAX_PACKET_BYTES, Ended, Refused, Report, Start, Started

_STDERR = 2


class _Child(NamedTuple):
    pid: int
    pidfd: int
    reports: socket.socket


class _Job(NamedTuple):
    """A child's work, with the descriptors that came for it."""

    start: Start
    fds: list[int]


class Server:
    """Starts children as it is asked to, and reports their ends."""

    def __init__(self, asks: socket.socket, modules: Sequence[str]) -> None:
        self._asks = asks
        self._to_import = deque(modules)
        self._children: dict[int, _Child] = {}  # by pidfd
        self._selector = selectors.DefaultSelector()
        self._selector.register(asks, selectors.EVENT_READ)

    def serve(self) -> _Job | None:
        """Return None at the end; in a child, which is another process then, what it is to do."""
        is_asked = True
        while is_asked or self._children:
            ready = self._selector.select(0.0 if self._to_import else None)
            if not ready:
                _import(self._to_import.popleft())
            for key, _ in ready:
                if key.fileobj is not self._asks:
                    self._report_end(self._children.pop(key.fd))
                    continue
                packet, fds, _, _ = socket.recv_fds(self._asks, MAX_PACKET_BYTES, MAX_FDS)
                if not packet:
                    is_asked = False
                    self._to_import.clear()
                    self._selector.unregister(self._asks)
                elif (job := self._fork(_start_in(fds[0]), fds[1:])) is not None:
                    return job
        return None

    def _fork(self, start: Start, fds: list[int]) -> _Job | None:
        reports, passed = socket.socket(fileno=fds[0]), fds[1:]
        for module in start.imports:
            _import(module)
        try:
            pid = os.fork()
        except OSError as error:
            _report(reports, Refused(error=str(error)))
            reports.close()
        else:
            if pid == 0:
                reports.close()
                self._close()
                return _Job(start, passed)
            self._watch(_Child(pid, os.pidfd_open(pid), reports))
        for fd in passed:
            os.close(fd)
        return None

    def _watch(self, child: _Child) -> None:
        with contextlib.suppress(OSError):  # the child does the same, and may have ended already
            os.setpgid(child.pid, child.pid)
        _report(child.reports, Started(pid=child.pid), [child.pidfd])
        self._children[child.pidfd] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ)

    def _report_end(self, child: _Child) -> None:
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        _, status = os.waitpid(child.pid, 0)
        _report(child.reports, Ended(code=os.waitstatus_to_exitcode(status)))
        child.reports.close()

    def _close(self) -> None:
        """Let go, in a child, of all that is the server's."""
        self._selector.close()
        self._asks.close()
        for child in self._children.values():
            os.close(child.pidfd)
            child.reports.close()


def _start_in(fd: int) -> Start:
    """Read what a file holds, and close it."""
    with open(fd, "rb") as file:
        file.seek(0)  # whoever wrote it left its end behind
        return msgspec.msgpack.decode(file.read(), type=Start)


def _import(module: str) -> None:
    """Import, if it is not there. What cannot be imported the program meets itself, and says so."""
    with kept_imports(), contextlib.suppress(Exception):
        importlib.import_module(module)


def _report(reports: socket.socket, report: Report, fds: Sequence[int] = ()) -> None:
    with contextlib.suppress(OSError):  # the launcher does not want to know any more
        socket.send_fds(reports, [msgspec.json.encode(report)], fds)


def _run(job: _Job) -> None:
    """Be the program: of its own process group, under its name, with its environment and arguments."""
    start, fds = job
    os.setpgid(0, 0)
    setproctitle(start.title)
    os.environ.clear()
    os.environb.update(start.env)
    if start.has_stderr:
        os.dup2(fds[-1], _STDERR)
        os.close(fds[-1])
    told = (word for flag, fd in zip(start.flags, fds, strict=False) for word in (flag, str(fd)))
    sys.argv = [start.module, *map(os.fsdecode, start.args), *told]
    runpy.run_module(start.module, run_name="__main__")


def main() -> None:
    ended_by_interrupts()  # children too, until they say otherwise
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as others may start us, no end is told
    asks = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(asks.fileno(), False)
    if (job := Server(asks, sys.argv[2:]).serve()) is not None:
        _run(job)


if __name__ == "__main__":
    main()
