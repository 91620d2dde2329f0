"""Other ranks as forks of one process with their imports, of which torch's take a second of a core for each.

Run as `python -m kvferry.tests.engine.forked_ranks FD` it is that process: a packet on the socket FD is the environment
of a rank, which comes with the rank's own socket; the answer is the rank's process id.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType

import msgspec

from kvferry.common.imports import kept_imports

_MAX_BYTES = 2**17


class ForkedRank:
    """What `RankGroup` needs of a Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd: int | None = os.pidfd_open(pid)

    def wait(self, timeout: float | None = None) -> None:
        """Wait for its end. Raises TimeoutExpired."""
        if self._pidfd is not None:
            if not select.select([self._pidfd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout or 0.0)
            os.close(self._pidfd)
            self._pidfd = None

    def kill(self) -> None:
        if self._pidfd is not None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


class RankForks:
    """Stands for `subprocess` in `engine/ranks/group.py`. Its process is there from the first rank to `close`."""

    DEVNULL, TimeoutExpired = subprocess.DEVNULL, subprocess.TimeoutExpired

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._asks: socket.socket | None = None

    def Popen(
        self, command: Sequence[str], *, pass_fds: Sequence[int], env: Mapping[str, str], stdin: int
    ) -> ForkedRank:
        assert command[1:] == ["-m", "kvferry.engine.follower_process", str(pass_fds[0])] and stdin == self.DEVNULL
        if self._asks is None:
            self._asks, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                own = [sys.executable, "-m", "kvferry.tests.engine.forked_ranks", str(theirs.fileno())]
                self._process = subprocess.Popen(own, pass_fds=[theirs.fileno()], env=env, stdin=stdin)
        socket.send_fds(self._asks, [msgspec.json.encode(env)], pass_fds)
        return ForkedRank(msgspec.json.decode(self._asks.recv(_MAX_BYTES), type=int))

    def close(self) -> None:
        if self._asks is not None and self._process is not None:
            self._asks.close()
            self._process.wait()


def _reap(number: int, frame: FrameType | None) -> None:
    """Take the ends of ranks: nobody asks how they ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    asks = socket.socket(fileno=int(sys.argv[1]))
    with kept_imports():
        from kvferry.engine import follower
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        packet, fds, _, _ = socket.recv_fds(asks, _MAX_BYTES, 1)
        if not packet:
            return
        if pid := os.fork():
            os.close(fds[0])
            asks.send(msgspec.json.encode(pid))
            continue
        asks.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(msgspec.json.decode(packet, type=dict[str, str]))
        code = follower.main(fds[0])
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
