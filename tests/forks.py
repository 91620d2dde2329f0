"""Programs of tests as forks of one process that has their imports, of which torch's take a second of a core for each.

Run as `python -m kvferry.tests.forks FD MODULE...` it is that process: a packet on the socket FD is a `_Start`, which
comes with a pipe for the exit code and the descriptors that the program gets; the answer is its process id, with a
descriptor of the process.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import IO, NamedTuple

import msgspec
from setproctitle import setproctitle

from kvferry.common.exits import exit_process
from kvferry.common.imports import kept_imports

_MAX_BYTES = 2**17
_MAX_FDS = 16
# Without threads that an import starts, as a fork would be without them. Titles take the room of the environment.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "_ROOM": "." * 2**14}
_UNKNOWN = -signal.SIGHUP  # how a program ended whose fork's parent has gone
_FREE_FD = 100  # from here on nothing else is open, but what a program is to get by such numbers

_Stream = int | IO[bytes] | None


class _Start(msgspec.Struct):
    words: list[str]  # behind the interpreter
    env: dict[str, str]
    fds: list[int]  # what the descriptors are called there
    leads_group: bool
    leads_session: bool


class Fork:
    """A program that runs: what tests need of a Popen. `stdin` and `stdout` are there if they were asked for."""

    def __init__(
        self, args: Sequence[str], pid: int, pidfd: int, end: int, stdin: IO[str] | None, stdout: IO[str] | None
    ) -> None:
        """`pidfd` can be read once the program has ended, and then `end` its exit code."""
        self.args, self.pid, self.stdin, self.stdout = args, pid, stdin, stdout
        self.returncode: int | None = None  # or the signal's number below zero
        self._pidfd, self._end = pidfd, end

    def fileno(self) -> int:
        """Return a descriptor that can be read once the program has ended; none any more when that was noticed."""
        return self._pidfd

    def poll(self) -> int | None:
        """Return the exit code if the program has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns the exit code. Raises TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._pidfd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            with open(self._end, "rb") as end:
                told = end.read()
            os.close(self._pidfd)
            self.returncode = int(told or _UNKNOWN)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> None:
        """Let it read to the end, and wait for its own; what it has left to say is not read."""
        if self.stdin is not None:
            with suppress(BrokenPipeError):
                self.stdin.close()
        self.wait()
        if self.stdout is not None:
            self.stdout.close()


class Forks:
    """Starts programs as `subprocess` does. Its process is there from the first of them to `close`.

    `asks`: where one is asked that runs `serve` already, and ends with this process.
    """

    PIPE, DEVNULL, STDOUT = subprocess.PIPE, subprocess.DEVNULL, subprocess.STDOUT
    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self, *imports: str, asks: socket.socket | None = None) -> None:
        self._imports = imports
        self._process: subprocess.Popen[bytes] | None = None
        self._asks = asks

    @classmethod
    def here(cls) -> Forks:
        """Fork this process, which has one thread yet: programs start as forks of what it is now, until it ends."""
        asks, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if _fork() == 0:
            asks.close()
            setproctitle(f"python -m {__name__}")  # not the name that it is found by
            serve(theirs)
            exit_process(0)
        theirs.close()
        return cls(asks=asks)

    def Popen(
        self,
        command: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        stdin: _Stream = None,
        stdout: _Stream = None,
        stderr: _Stream = None,
        text: bool = False,
        process_group: int | None = None,
        start_new_session: bool = False,
    ) -> Fork:
        assert command[0] == sys.executable and (text or self.PIPE not in (stdin, stdout, stderr))
        ours: dict[int, IO[str]] = {}
        with ExitStack() as theirs, open(os.devnull, "r+b", buffering=0) as nothing:
            fds = {fd: fd for fd in pass_fds}
            for number, wanted in enumerate((stdin, stdout, stderr)):
                if wanted == self.PIPE:
                    ends = os.pipe()
                    fds[number] = ends[number > 0]
                    theirs.callback(os.close, fds[number])
                    ours[number] = os.fdopen(ends[number == 0], "w" if number == 0 else "r")
                elif wanted == self.STDOUT:
                    fds[number] = fds[1]
                elif wanted == self.DEVNULL:
                    fds[number] = nothing.fileno()
                else:
                    fds[number] = number if wanted is None else wanted if isinstance(wanted, int) else wanted.fileno()
            end, told = os.pipe()
            theirs.callback(os.close, told)
            start = _Start(
                words=list(command[1:]),
                env=dict(os.environ if env is None else env),
                fds=list(fds),
                leads_group=process_group == 0,
                leads_session=start_new_session,
            )
            pid, pidfd = self._ask(start, [told, *fds.values()])
        return Fork(command, pid, pidfd, end, ours.get(0), ours.get(1))

    def _ask(self, start: _Start, fds: Sequence[int]) -> tuple[int, int]:
        if self._asks is None:
            self._asks, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [sys.executable, "-m", "kvferry.tests.forks", str(theirs.fileno()), *self._imports]
                env = os.environ | _ENVIRONMENT
                self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=env)
        socket.send_fds(self._asks, [msgspec.json.encode(start)], fds)
        answer, [pidfd], _, _ = socket.recv_fds(self._asks, _MAX_BYTES, 1)
        return msgspec.json.decode(answer, type=int), pidfd

    def close(self) -> None:
        if self._asks is not None and self._process is not None:
            self._asks.close()
            self._process.wait()


def _run(start: _Start, fds: Sequence[int]) -> None:
    """Be the program, which has a session or a group of its own if it is to, and no random numbers of its parent's."""
    if start.leads_session:
        os.setsid()
    elif start.leads_group:
        os.setpgid(0, 0)
    if random := sys.modules.get("numpy.random"):
        random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()
    setproctitle(" ".join(["python", *start.words]))
    free_fd = max([_FREE_FD, *(1 + fd for fd in start.fds)])
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, free_fd) for fd in fds]
    for fd in fds:
        os.close(fd)
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
    if (job := _forked(asks)) is not None:
        _run(*job)


def _fork() -> int:
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "a fork would be without the other threads"
    return os.fork()


class _Child(NamedTuple):
    pid: int
    pidfd: int
    told: int  # where its exit code is waited for

    def tell_end(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        with suppress(BrokenPipeError):  # nobody wants to know any more
            os.write(self.told, str(os.waitstatus_to_exitcode(status)).encode())
        self.close()

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.told)


def _forked(asks: socket.socket) -> tuple[_Start, list[int]] | None:
    """Return at the end; in a fork, what it is to be, with the descriptors that came for it."""
    children: dict[int, _Child] = {}  # by pidfd
    with selectors.DefaultSelector() as selector:
        selector.register(asks, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not asks:
                    selector.unregister(key.fd)
                    children.pop(key.fd).tell_end()
                    continue
                packet, fds, _, _ = socket.recv_fds(asks, _MAX_BYTES, _MAX_FDS)
                if not packet:
                    return None
                told, *passed = fds
                if (pid := _fork()) == 0:
                    asks.close()
                    os.close(told)
                    for child in children.values():
                        child.close()
                    return msgspec.json.decode(packet, type=_Start), passed
                pidfd = os.pidfd_open(pid)
                children[pidfd] = _Child(pid, pidfd, told)
                selector.register(pidfd, selectors.EVENT_READ)
                socket.send_fds(asks, [msgspec.json.encode(pid)], [pidfd])
                for fd in passed:
                    os.close(fd)


if __name__ == "__main__":
    main()
