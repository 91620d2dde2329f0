"""The workers of a system as an onlooker knows them, and what is done to them.

The router's log says when a worker joins or is lost, a process descriptor says when it dies; times are the run's. One
that runs is struck now and then: by SIGKILL, to its first process or to another rank's, or by SIGSTOP, which the
launcher ends with SIGKILL once it has heard nothing for a while, unless SIGCONT comes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import psutil

from ...common.errors import ConfigError
from .events import Event, Note
from .programs import program_name

# "kill", "rank" (kill, of another rank), "hang" (stopped, and left so), "pause" (stopped, and continued), "router"
# (kill, of a router), "restart" (of everything, one process after the other, which the launcher is asked for).
Kind = str
KINDS = ("kill", "kill", "hang", "pause")
KNOWN_KINDS = ("kill", "rank", "hang", "pause", "router", "restart")
_PAUSE_S = (0.3, 4.5)  # around the time at which a launcher loses patience


@dataclass(slots=True)
class WorkerProcess:
    """A process of a worker. `pidfd` names it even when its number is given to another."""

    worker_id: str
    role: str
    pid: int
    pidfd: int
    joined_s: float
    died_s: float | None = None
    is_stopped: bool = False

    @property
    def other_ranks(self) -> list[int]:
        """Return the process ids of its tensor-parallel ranks but the first."""
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(self.pid).children()
            return sorted(child.pid for child in found if "kvferry.engine.follower_process" in child.cmdline())
        return []

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)


@dataclass(slots=True)
class Strike:
    """A blow to a worker, and what came of it."""

    kind: Kind
    worker_id: str
    role: str
    pid: int
    at_s: float
    died_s: float | None = None  # None: a pause that it outlived
    lost_s: float | None = None  # the router's word
    back_s: float | None = None

    @property
    def notice_s(self) -> float | None:
        return None if self.lost_s is None else self.lost_s - self.at_s

    @property
    def absence_s(self) -> float | None:
        """Return the time from the death until the router had a new one (seconds)."""
        return None if self.died_s is None or self.back_s is None else self.back_s - self.died_s


@dataclass(slots=True, frozen=True)
class _Restart:
    """The command that restarts everything, while it runs."""

    process: subprocess.Popen[bytes]
    pidfd: int
    strike: Strike

    def end(self) -> int:
        """Return its exit code, once it has ended."""
        os.close(self.pidfd)
        return self.process.wait()


class Workers:
    """Lives on the event loop, but for `close`."""

    def __init__(
        self,
        began_s: float,
        tell: Callable[[Event], None],
        kinds: Sequence[Kind] = KINDS,
        *,
        router_pids: Callable[[], Sequence[int]] | None = None,
        restart: Sequence[str] = (),
        restart_log: Path = Path(os.devnull),
    ) -> None:
        """`router_pids()`: the routers' processes that run, where routers are struck.
        `restart`: the command that restarts everything; `restart_log`: what it shows.
        """
        self._kinds = kinds
        self._router_pids = router_pids
        self._restart = restart
        self._restart_log = restart_log
        self._restarting: _Restart | None = None
        self._is_at_rest = asyncio.Event()
        self._is_at_rest.set()
        self.strikes: list[Strike] = []
        self.num_joined = 0
        self._began_s = began_s
        self._tell = tell
        self._processes: dict[str, WorkerProcess] = {}  # the latest of each worker

    def on_note(self, note: Note) -> None:
        """A line of the router's log."""
        if note.what == "worker_joined":
            self._on_joined(note)
        elif note.what == "worker_lost":
            strike = self._last_strike(note.worker_id)
            if strike is not None and strike.lost_s is None and strike.back_s is None and note.at_s >= strike.at_s:
                strike.lost_s = note.at_s

    def _on_joined(self, note: Note) -> None:
        pid, old = note.detail["pid"], self._processes.get(note.worker_id)
        assert isinstance(pid, int)
        if old is not None and old.pid == pid:
            return  # a new session of a process that was paused
        try:
            if not _is_worker(pid, note.worker_id):
                raise ConfigError(f"{note.worker_id}: process {pid} of this machine is another: none is struck")
            pidfd = os.pidfd_open(pid)
        except (ProcessLookupError, psutil.Error):
            return  # dead already: the next one will join
        if old is not None:
            self._forget(old)
        process = WorkerProcess(note.worker_id, str(note.detail["role"]), pid, pidfd, note.at_s)
        self._processes[note.worker_id] = process
        self.num_joined += 1
        asyncio.get_running_loop().add_reader(pidfd, self._on_death, process)
        strike = self._last_strike(note.worker_id)
        if strike is not None and strike.back_s is None and strike.pid != pid:
            strike.back_s = note.at_s

    def _on_death(self, process: WorkerProcess) -> None:
        asyncio.get_running_loop().remove_reader(process.pidfd)
        process.died_s = self._now()
        self._tell(Note(at_s=process.died_s, what="death", worker_id=process.worker_id, detail={"pid": process.pid}))
        strike = self._last_strike(process.worker_id)
        if strike is not None and strike.pid == process.pid:
            strike.died_s = process.died_s

    def _last_strike(self, worker_id: str) -> Strike | None:
        return next((strike for strike in reversed(self.strikes) if strike.worker_id == worker_id), None)

    @property
    def up(self) -> list[WorkerProcess]:
        """Return the workers that run, by name."""
        alive = (process for process in self._processes.values() if process.died_s is None and not process.is_stopped)
        return sorted(alive, key=lambda process: process.worker_id)

    def check(self) -> None:
        """Refuse blows that cannot be dealt to those that run. Raises ConfigError."""
        if "rank" in self._kinds and not any(process.other_ranks for process in self.up):
            wanted = "--serve-flags '--tensor-parallel-size 2'"
            raise ConfigError(f"--blows rank: no worker has another rank to be struck; give {wanted}")

    def strike(self, source: random.Random) -> Strike | None:
        """Strike one of those that run; None: there is none."""
        if not self.up:
            return None
        process, kind = source.choice(self.up), source.choice(self._kinds)
        if kind == "router":
            return self._strike_router(source)
        if kind == "restart":
            return self._begin_restart()
        ranks = process.other_ranks if kind == "rank" else []
        if kind == "rank" and not ranks:
            return None  # it has only just begun
        strike = Strike(kind, process.worker_id, process.role, process.pid, self._now())
        self.strikes.append(strike)
        self._tell(Note(at_s=strike.at_s, what=kind, worker_id=process.worker_id, detail={"pid": process.pid}))
        if kind == "rank":
            with contextlib.suppress(ProcessLookupError):
                os.kill(source.choice(ranks), signal.SIGKILL)
            return strike
        if kind == "kill":
            process.signal(signal.SIGKILL)
            return strike
        process.is_stopped = True
        process.signal(signal.SIGSTOP)
        if kind == "pause":
            asyncio.get_running_loop().call_later(source.uniform(*_PAUSE_S), self._go_on, process)
        return strike

    def _strike_router(self, source: random.Random) -> Strike | None:
        assert self._router_pids is not None
        if not (pids := self._router_pids()):
            return None
        strike = Strike("kill", "a router", "router", source.choice(pids), self._now())
        with contextlib.suppress(ProcessLookupError):
            os.kill(strike.pid, signal.SIGKILL)
        self.strikes.append(strike)
        self._tell(Note(at_s=strike.at_s, what="kill", worker_id="router", detail={"pid": strike.pid}))
        return strike

    def _begin_restart(self) -> Strike | None:
        """Ask for it, unless the one before still runs. It counts once it has ended well."""
        if self._restarting is not None:
            return None
        with self._restart_log.open("ab") as log:
            process = subprocess.Popen(self._restart, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        strike = Strike("restart", "everything", "all", process.pid, self._now())
        self._restarting = restart = _Restart(process, os.pidfd_open(process.pid), strike)
        self._is_at_rest.clear()
        asyncio.get_running_loop().add_reader(restart.pidfd, self._on_restarted, restart)
        self._tell(Note(at_s=strike.at_s, what="restart", worker_id="everything", detail={"pid": strike.pid}))
        return strike

    def _on_restarted(self, restart: _Restart) -> None:
        """Count a restart that is over. Where a worker died meanwhile it may have failed."""
        asyncio.get_running_loop().remove_reader(restart.pidfd)
        code = restart.end()
        self._restarting = None
        self._is_at_rest.set()
        if code == 0:
            self.strikes.append(restart.strike)
        detail: dict[str, object] = {"pid": restart.strike.pid, "code": code}
        self._tell(Note(at_s=self._now(), what="restarted", worker_id="everything", detail=detail))

    async def until_restarted(self, timeout_s: float) -> None:
        """Wait for the end of a restart that is under way, for so long at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._is_at_rest.wait()

    def _go_on(self, process: WorkerProcess) -> None:
        process.is_stopped = False
        if process.died_s is None:
            detail: dict[str, object] = {"pid": process.pid}
            self._tell(Note(at_s=self._now(), what="continue", worker_id=process.worker_id, detail=detail))
            process.signal(signal.SIGCONT)

    def close(self) -> None:
        """Leave no process stopped, and no restart under way. For when the event loop has ended, in whatever way."""
        if self._restarting is not None:
            self._restarting.process.kill()
            self._restarting.end()
            self._restarting = None
        for process in self._processes.values():
            process.signal(signal.SIGCONT)
            os.close(process.pidfd)
        self._processes.clear()

    def _forget(self, process: WorkerProcess) -> None:
        asyncio.get_running_loop().remove_reader(process.pidfd)
        with contextlib.suppress(OSError):
            os.close(process.pidfd)

    def _now(self) -> float:
        return perf_counter() - self._began_s


def _is_worker(pid: int, worker_id: str) -> bool:
    """Say whether a process is that worker, which may be another machine's. Raises psutil.Error if it has ended."""
    process = psutil.Process(pid)
    if program_name(process) == worker_id:
        return True
    if not process.cmdline():  # it is ending: its memory has gone already
        raise psutil.NoSuchProcess(pid)
    return False
