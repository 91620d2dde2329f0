"""`ForkServer` has children started by a process that has their imports (server.py), and is a launcher's hold on it.

Where that process is lost its children go on and are watched as before; only how they end is not known any more. The
next start brings up another one. One that hangs is ended where a start waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import msgspec
import structlog

from .messages import MAX_PACKET_BYTES, Ended, Refused, Report, Start, Started

# Pools of threads that libraries start while they are imported: a fork would be without them.
_NO_POOLS = {"OPENBLAS_NUM_THREADS": "1"}
_SERVER = (sys.executable, "-m", f"{__package__}.server")
_MODULE_FLAG = (sys.executable, "-m")
_START_S = 120.0  # to a server's first answer: interpreter and imports, on a machine that is busy
_ANSWER_S = 30.0  # to any other and to its word of a child's end: milliseconds, but for the seconds of an import

log = structlog.get_logger(__name__)


class ForkedProcess:
    """A child that a fork server has started. Belongs to the loop that started it."""

    def __init__(self, pid: int, pidfd: int, reports: socket.socket) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._end = asyncio.get_running_loop().create_task(self._watch(reports), name=f"end of {pid}")

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal. Raises ProcessLookupError if it has ended."""
        if self._end.done():
            raise ProcessLookupError
        signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> int | None:
        """Wait until it has ended; returns the exit code, or the signal's number below zero, None: nobody knows."""
        return await asyncio.shield(self._end)

    async def _watch(self, reports: socket.socket) -> int | None:
        try:
            with reports:
                await _readable(self._pidfd)
                is_told = await _is_readable(reports.fileno(), _ANSWER_S)  # not by a server that hangs
                report = _receive(reports)[0] if is_told else None
            return report.code if isinstance(report, Ended) else None
        finally:
            os.close(self._pidfd)


class ForkServer:
    """Starts some programs `python -m MODULE`. Its process is there from the first start to `close`."""

    def __init__(self, env: Mapping[str, str], imports: Mapping[str, Sequence[str]]) -> None:
        """`imports`: what each program will need, by its module; the first is wanted first. `env`: of imports."""
        self._env = {**env, **{name: env.get(name, value) for name, value in _NO_POOLS.items()}}
        self._imports = {module: tuple(needed) for module, needed in imports.items()}
        self._processes: list[asyncio.subprocess.Process] = []  # the last one is asked, others have children left
        self._asks: socket.socket | None = None
        self._has_answered = False  # the one that is asked
        self._starting = asyncio.Lock()  # one start at a time: nothing waits in the socket

    def can_start(self, argv: Sequence[str]) -> bool:
        """Say whether this is one of its programs."""
        return tuple(argv[:2]) == _MODULE_FLAG and argv[2] in self._imports

    async def start(
        self, argv: Sequence[str], fds: Mapping[str, int], env: Mapping[str, str], stderr_fd: int | None, title: str
    ) -> ForkedProcess:
        """Start a program in a process group of its own. It gets each flag of `fds` with the descriptor's number there.

        Raises OSError where the system has no room for it, or where two fork servers in a row have ended.
        """
        start = Start(
            module=argv[2],
            imports=self._imports[argv[2]],
            args=tuple(map(os.fsencode, argv[3:])),
            flags=tuple(fds),
            has_stderr=stderr_fd is not None,
            env=tuple((os.fsencode(name), os.fsencode(value)) for name, value in env.items()),
            title=title,
        )
        passed = [*fds.values(), *([stderr_fd] if stderr_fd is not None else [])]
        async with self._starting:
            for _ in range(2):
                if (process := await self._ask(start, passed)) is not None:
                    return process
                self.renew()
        raise ChildProcessError("the process that starts the others has ended, twice")

    async def _ask(self, start: Start, fds: Sequence[int]) -> ForkedProcess | None:
        """Start a program; None where the server has ended, or hung. Raises OSError as `start` does."""
        ours, theirs = _packet_pair()
        with contextlib.ExitStack() as stack:
            stack.enter_context(ours)
            with theirs:
                asks = await self._server()
                try:
                    with _file_with(start) as file:
                        socket.send_fds(asks, [b"start"], [file.fileno(), theirs.fileno(), *fds])
                except ConnectionError:
                    return None
            limit_s = _ANSWER_S if self._has_answered else _START_S
            if not await _is_readable(ours.fileno(), limit_s):
                log.warning("fork_server_hangs", pid=self._processes[-1].pid, limit_s=limit_s)
                with contextlib.suppress(ProcessLookupError):  # else it could start the program as well, later
                    self._processes[-1].kill()
                return None
            self._has_answered = True
            report, received = _receive(ours)
            if isinstance(report, Refused):
                raise OSError(report.error)
            if not isinstance(report, Started):
                return None
            stack.pop_all()
            return ForkedProcess(report.pid, received[0], ours)

    async def _server(self) -> socket.socket:
        """Return where it is asked; it is started if it is not there."""
        if self._asks is None:
            asks, theirs = _packet_pair()
            argv = [*_SERVER, str(theirs.fileno()), *itertools.chain(*self._imports.values())]
            with theirs, contextlib.ExitStack() as stack:
                stack.enter_context(asks)
                process = await asyncio.create_subprocess_exec(
                    *argv, env=self._env, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], process_group=0
                )
                stack.pop_all()
            self._processes = [old for old in self._processes if old.returncode is None] + [process]
            self._asks, self._has_answered = asks, False
        return self._asks

    def renew(self) -> None:
        """Import everything anew, from the files as they are then, for the children that are started from here on."""
        if self._asks is not None:
            self._asks.close()  # it ends after its last child
            self._asks = None

    async def close(self) -> None:
        """End the server; children stay. Idempotent."""
        self.renew()
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        self._processes.clear()


def _file_with(start: Start) -> BinaryIO:
    """Return a file without a name that holds it."""
    file = open(os.memfd_create("start"), "wb", buffering=0)  # noqa: SIM115 - the caller closes it
    file.write(msgspec.msgpack.encode(start))
    return file


def _packet_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


async def _readable(fd: int) -> None:
    """Wait until something can be read, an end too."""
    loop = asyncio.get_running_loop()
    is_readable = asyncio.Event()
    loop.add_reader(fd, is_readable.set)
    try:
        await is_readable.wait()
    finally:
        loop.remove_reader(fd)


async def _is_readable(fd: int, limit_s: float) -> bool:
    """Wait for it, for so long at most."""
    try:
        async with asyncio.timeout(limit_s):
            await _readable(fd)
    except TimeoutError:
        return False
    return True


def _receive(reports: socket.socket) -> tuple[Report | None, list[int]]:
    """Return a report and the descriptors with it; None where the server has ended."""
    try:
        packet, fds, _, _ = socket.recv_fds(reports, MAX_PACKET_BYTES, 1)
    except ConnectionError:
        return None, []
    return (msgspec.json.decode(packet, type=Report) if packet else None), fds
