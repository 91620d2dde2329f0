"""A server under test as a child process: started with a log file, awaited, and ended with all that it started.

Every child leads a process group of its own. Its descendants are noted before it is asked to end, and those that
outlive it are killed one by one: a server that is left over would spoil every later measurement. Where who started it
is killed, the child is asked to end by the kernel.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...common.config import CACHE_VARIABLE, FAILPOINTS_VARIABLE
from ...common.errors import ConfigError
from .cores import Process, process_tree, processes

_POLL_S = 0.25
_TERM_S = 30.0
_KILL_S = 10.0
_LOG_TAIL_CHARS = 1500
_PORTS_OF_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LEAST_PORT = 10_000
_PORT_TRIES = 64
_SETTINGS = "KVFERRY_"
# Becomes the command: its process's number, its arguments and its environment are those of this one, which is told to
# end with its parent. That may have ended already.
_TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"cannot start {sys.argv[2]}: {error.strerror}")
"""


class ServerProcess:
    """One running child."""

    def __init__(
        self, name: str, command: Sequence[str], log_path: Path, env: Mapping[str, str], term_s: float = _TERM_S
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._term_s = term_s
        if shutil.which(command[0]) is None:
            raise ConfigError(f"{name}: cannot start {command[0]}: there is no such program")
        with log_path.open("wb") as log:
            try:
                self._child = subprocess.Popen(
                    tied(command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_inherited() | dict(env),
                    start_new_session=True,
                )
            except OSError as error:
                raise ConfigError(f"{name}: cannot start {command[0]}: {error.strerror}") from error

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_until_healthy(self, url: str, timeout_s: float) -> None:
        """Returns once the URL answers 200. A child that ends before is an error with the tail of its log."""
        deadline_s = time.perf_counter() + timeout_s
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine
        while time.perf_counter() < deadline_s:
            if self._child.poll() is not None:
                raise ConfigError(f"{self.name} ended with {self._child.returncode}:\n{self.log_tail()}")
            with contextlib.suppress(OSError):  # not up, or not healthy: both are errors there
                with opener.open(url, timeout=5.0):
                    return
            time.sleep(_POLL_S)
        raise ConfigError(f"{self.name} was not healthy within {timeout_s:g} s:\n{self.log_tail()}")

    def wait(self, timeout_s: float) -> int | None:
        """The child's exit code; None: it still runs."""
        try:
            return self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Ends the child and every process below it."""
        tree = process_tree([self.pid], processes())
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(self._term_s)
        deadline_s = time.perf_counter() + _KILL_S
        while left := _alive(tree):
            if time.perf_counter() > deadline_s:
                raise ConfigError(f"{self.name}: processes {[process.pid for process in left]} do not end")
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            time.sleep(_POLL_S)
        self._child.wait(_KILL_S)

    def log_tail(self) -> str:
        return self.log_path.read_text(errors="replace")[-_LOG_TAIL_CHARS:]


@contextmanager
def running(
    name: str, command: Sequence[str], log_dir: Path, env: Mapping[str, str] | None = None, *, term_s: float = _TERM_S
) -> Iterator[ServerProcess]:
    """The child while the block runs; at its end it has `term_s` before it is killed."""
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"logs cannot be written to {log_dir}: {error.strerror}") from error
    with _ended_by_signals():
        process = ServerProcess(name, command, log_dir / f"{name}.log", env or {}, term_s)
        try:
            yield process
        finally:
            process.stop()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and a terminal's end unwind the stack, so that no server outlives whoever measures it.

    Where one has a handler: that one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) == signal.SIG_DFL]
    for each in ours:
        signal.signal(each, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)


def _inherited() -> dict[str, str]:
    """Return this process's environment without settings of kvferry: those of a server under test are its flags."""
    kept = (CACHE_VARIABLE, FAILPOINTS_VARIABLE)
    return {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS) or name in kept}


def tied(command: Sequence[str]) -> Sequence[str]:
    """Return a command that ends with its parent. That is a thread to the kernel: no other than the main one lasts."""
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return command
    return [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *command]


def _alive(tree: Sequence[Process]) -> list[Process]:
    """Return those that still run: a number may have been given to another process meanwhile."""
    now = processes()
    return [old for old in tree if old.is_same(now.get(old.pid)) and not now[old.pid].is_zombie]


def free_port() -> int:
    """A port of the loopback interface that nobody uses now, and that no connection is given meanwhile."""
    first = _first_of_connections()
    for port in random.sample(range(_LEAST_PORT, first), min(_PORT_TRIES, first - _LEAST_PORT)):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _first_of_connections() -> int:
    """Return the first port that the kernel gives to connections, at whose end nobody listens."""
    try:
        return max(int(_PORTS_OF_CONNECTIONS.read_text().split()[0]), _LEAST_PORT)
    except (OSError, ValueError, IndexError):
        return _LEAST_PORT
