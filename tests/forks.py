"""Programs of tests as forks of one process that has their imports, of which torch's take a second of a core for each.

Run as `python -m kvferry.tests.forks FD MODULE...` it is that process: a packet on the socket FD is a `_Start`, which
comes with the descriptors that the program gets; the answer is its process id.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from types import FrameType
from typing import IO

import msgspec

from kvferry.common.imports import kept_imports

_MAX_BYTES = 2**17
_FREE_FD = 100  # from here on nothing else is open, but what a program is to get by such numbers


class _Start(msgspec.Struct):
    words: list[str]  # behind the interpreter
    env: dict[str, str]
    fds: list[int]  # what the descriptors are called there


class Fork:
    """A program that runs: what tests need of a Popen. `stdin` and `stdout` are there if they were asked for."""

    def __init__(self, pid: int, stdin: IO[str] | None, stdout: IO[str] | None) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self._pidfd: int | None = os.pidfd_open(pid)

    def wait(self, timeout: float | None = None) -> None:
        """Wait for its end. Raises TimeoutExpired."""
        if self._pidfd is not None:
            if not select.select([self._pidfd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            os.close(self._pidfd)
            self._pidfd = None

    def kill(self) -> None:
        if self._pidfd is not None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def communicate(self) -> None:
        """Wait for its end; what it has left to say is not read."""
        self.wait()
        for pipe in (self.stdin, self.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


class Forks:
    """Starts programs as `subprocess` does. Its process is there from the first of them to `close`.

    `asks`: where one is asked that runs `serve` already, and ends with this process.
    """

    PIPE, DEVNULL, TimeoutExpired = subprocess.PIPE, subprocess.DEVNULL, subprocess.TimeoutExpired

    def __init__(self, *imports: str, asks: socket.socket | None = None) -> None:
        self._imports = imports
        self._process: subprocess.Popen[bytes] | None = None
        self._asks = asks

    def Popen(
        self,
        command: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        text: bool = False,
    ) -> Fork:
        assert command[0] == sys.executable and (text or self.PIPE not in (stdin, stdout, stderr))
        ours: dict[int, IO[str]] = {}
        with ExitStack() as theirs, open(os.devnull, "r+b", buffering=0) as nothing:
            fds = {fd: fd for fd in pass_fds}
            for number, wanted in enumerate((stdin, stdout, stderr)):
                if wanted == self.DEVNULL:
                    fds[number] = nothing.fileno()
                elif wanted == self.PIPE:
                    ends = os.pipe()
                    fds[number] = ends[number > 0]
                    theirs.callback(os.close, fds[number])
                    ours[number] = os.fdopen(ends[number == 0], "w" if number == 0 else "r")
            start = _Start(list(command[1:]), dict(os.environ if env is None else env), list(fds))
            pid = self._ask(start, list(fds.values()))
        return Fork(pid, ours.get(0), ours.get(1))

    def _ask(self, start: _Start, fds: Sequence[int]) -> int:
        if self._asks is None:
            self._asks, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [sys.executable, "-m", "kvferry.tests.forks", str(theirs.fileno()), *self._imports]
                self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        socket.send_fds(self._asks, [msgspec.json.encode(start)], fds)
        return msgspec.json.decode(self._asks.recv(_MAX_BYTES), type=int)

    def close(self) -> None:
        if self._asks is not None and self._process is not None:
            self._asks.close()
            self._process.wait()


def _reap(number: int, frame: FrameType | None) -> None:
    """Take the ends of programs: nobody asks how they ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _run(start: _Start, fds: Sequence[int]) -> None:
    """Be the program."""
    free_fd = max([_FREE_FD, *(1 + fd for fd in start.fds)])
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, free_fd) for fd in fds]
    for fd, name in zip(high, start.fds, strict=True):
        os.dup2(fd, name)
        os.close(fd)
    os.environ.clear()
    os.environ.update(start.env)
    if start.words[0] == "-m":
        sys.argv = start.words[1:]
        runpy.run_module(sys.argv[0], run_name="__main__")
    else:
        sys.argv = start.words
        runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    asks = socket.socket(fileno=int(sys.argv[1]))
    with kept_imports():
        for module in sys.argv[2:]:
            importlib.import_module(module)
    serve(asks)


def serve(asks: socket.socket) -> None:
    """Fork what is asked for until nobody can ask any more. In a fork, run its program first."""
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        packet, fds, _, _ = socket.recv_fds(asks, _MAX_BYTES, 8)
        if not packet:
            return
        if pid := os.fork():
            for fd in fds:
                os.close(fd)
            asks.send(msgspec.json.encode(pid))
            continue
        asks.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return _run(msgspec.json.decode(packet, type=_Start), fds)


if __name__ == "__main__":
    main()
