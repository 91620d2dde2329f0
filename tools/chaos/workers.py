"""The workers of a system as an onlooker knows them, and what is done to them.

The router's log says when a worker joins or is lost, a process descriptor says when it dies; times are the run's. One
that runs is struck now and then: by SIGKILL, or by SIGSTOP, which the launcher ends with SIGKILL once it has heard
nothing for a while, unless SIGCONT comes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from .events import Event, Note

Kind = str  # "kill", "hang" (stopped, and left so), "pause" (stopped, and continued)
KINDS = ("kill", "kill", "hang", "pause")
_PAUSE_S = (0.3, 4.5)  # around the time at which a launcher loses patience


@dataclass(slots=True)
class Life:
    """A process of a worker. `pidfd` names it even when its number is given to another."""

    worker_id: str
    role: str
    pid: int
    pidfd: int
    joined_s: float
    died_s: float | None = None
    is_stopped: bool = False

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


class Workers:
    """Lives on the event loop."""

    def __init__(self, began_s: float, tell: Callable[[Event], None]) -> None:
        self.strikes: list[Strike] = []
        self.num_joined = 0
        self._began_s = began_s
        self._tell = tell
        self._lives: dict[str, Life] = {}  # the latest of each worker
        self._timers: list[asyncio.TimerHandle] = []

    def on_note(self, note: Note) -> None:
        """A line of the router's log."""
        if note.what == "worker_joined":
            self._on_joined(note)
        elif note.what == "worker_lost":
            strike = self._last_strike(note.worker_id)
            if strike is not None and strike.lost_s is None and strike.back_s is None and note.at_s >= strike.at_s:
                strike.lost_s = note.at_s

    def _on_joined(self, note: Note) -> None:
        pid, old = note.detail["pid"], self._lives.get(note.worker_id)
        assert isinstance(pid, int)
        if old is not None and old.pid == pid:
            return  # a new session of a process that was paused
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return  # dead already: the next one will join
        if old is not None:
            self._forget(old)
        life = Life(note.worker_id, str(note.detail["role"]), pid, pidfd, note.at_s)
        self._lives[note.worker_id] = life
        self.num_joined += 1
        asyncio.get_running_loop().add_reader(pidfd, self._on_death, life)
        strike = self._last_strike(note.worker_id)
        if strike is not None and strike.back_s is None and strike.pid != pid:
            strike.back_s = note.at_s

    def _on_death(self, life: Life) -> None:
        asyncio.get_running_loop().remove_reader(life.pidfd)
        life.died_s = self._now()
        self._tell(Note(at_s=life.died_s, what="death", worker_id=life.worker_id, detail={"pid": life.pid}))
        strike = self._last_strike(life.worker_id)
        if strike is not None and strike.pid == life.pid:
            strike.died_s = life.died_s

    def _last_strike(self, worker_id: str) -> Strike | None:
        return next((strike for strike in reversed(self.strikes) if strike.worker_id == worker_id), None)

    @property
    def up(self) -> list[Life]:
        """Return the workers that run, by name."""
        alive = (life for life in self._lives.values() if life.died_s is None and not life.is_stopped)
        return sorted(alive, key=lambda life: life.worker_id)

    def strike(self, source: random.Random) -> Strike | None:
        """Strike one of those that run; None: there is none."""
        if not self.up:
            return None
        life, kind = source.choice(self.up), source.choice(KINDS)
        strike = Strike(kind, life.worker_id, life.role, life.pid, self._now())
        self.strikes.append(strike)
        self._tell(Note(at_s=strike.at_s, what=kind, worker_id=life.worker_id, detail={"pid": life.pid}))
        if kind == "kill":
            life.signal(signal.SIGKILL)
            return strike
        life.is_stopped = True
        life.signal(signal.SIGSTOP)
        if kind == "pause":
            delay_s = source.uniform(*_PAUSE_S)
            self._timers.append(asyncio.get_running_loop().call_later(delay_s, self._go_on, life))
        return strike

    def _go_on(self, life: Life) -> None:
        life.is_stopped = False
        if life.died_s is None:
            self._tell(Note(at_s=self._now(), what="continue", worker_id=life.worker_id, detail={"pid": life.pid}))
            life.signal(signal.SIGCONT)

    def close(self) -> None:
        """Leave no process stopped."""
        for timer in self._timers:
            timer.cancel()
        for life in self._lives.values():
            life.signal(signal.SIGCONT)
            self._forget(life)

    def _forget(self, life: Life) -> None:
        asyncio.get_running_loop().remove_reader(life.pidfd)
        with contextlib.suppress(OSError):
            os.close(life.pidfd)

    def _now(self) -> float:
        return perf_counter() - self._began_s
