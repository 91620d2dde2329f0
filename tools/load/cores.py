"""The use of cores during a run: by the client, the servers under test, or programs that have nothing to do with it.

A latency from a machine that others share says little, so each phase counts the cores that neither the client nor
the server under test kept busy. Read from /proc (Linux), a few milliseconds for each sample.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from ...common.errors import ConfigError

_QUIET_CORES = 0.3
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True, frozen=True)
class CoreUse:
    """Mean number of cores kept busy during a phase, by whom."""

    client: float
    server: float
    foreign: float


@dataclass(slots=True, frozen=True)
class Process:
    """One line of the process table."""

    pid: int
    parent_pid: int
    name: str  # the kernel keeps 15 characters
    cpu_s: float
    is_zombie: bool  # has ended, waits for its parent to notice
    start_ticks: int  # since boot: with the pid it names one process, as no other name does

    def is_same(self, other: Process | None) -> bool:
        """Say whether the other is this process, and none that was given its number later."""
        return other is not None and (self.pid, self.start_ticks) == (other.pid, other.start_ticks)


def processes() -> dict[int, Process]:
    """Every process now."""
    found = (_read_process(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return {process.pid: process for process in found if process is not None}


def process_tree(roots: Iterable[int], table: dict[int, Process]) -> list[Process]:
    """The roots that are alive and all their descendants."""
    children: dict[int, list[Process]] = {}
    for process in table.values():
        children.setdefault(process.parent_pid, []).append(process)
    tree = [table[pid] for pid in roots if pid in table]
    for process in tree:  # grows while it is walked
        tree += children.get(process.pid, [])
    return tree


def _read_process(entry: Path) -> Process | None:
    try:
        pid, _, rest = (entry / "stat").read_text().partition(" (")
    except OSError:
        return None  # ended meanwhile
    name, _, fields = rest.rpartition(") ")
    columns = fields.split()  # from `state` on, the third column of proc(5)
    cpu_s = (int(columns[11]) + int(columns[12])) / _TICKS_PER_S
    return Process(int(pid), int(columns[1]), name, cpu_s, columns[0] == "Z", start_ticks=int(columns[19]))


def pin_to_cores(num_cores: int) -> tuple[int, ...]:
    """Keep this process, and every one that it starts, on the first so many of the cores that it may use."""
    available = sorted(os.sched_getaffinity(0))
    cores = tuple(available[:num_cores])
    if len(cores) < num_cores:
        raise ConfigError(f"--num-cores {num_cores}: this process may use {len(available)}")
    os.sched_setaffinity(0, cores)
    return cores


@dataclass(slots=True, frozen=True)
class QuietWait:
    """A wait for a quiet machine: how long it was watched, and how many cores were busy in its last second."""

    waited_s: float
    busy_cores: float


def wait_until_quiet(limit_s: float, sample_s: float = 1.0) -> QuietWait:
    """Returns after a sample in which almost nothing ran, or when the time is up."""
    start_s = perf_counter()
    while True:
        before_s, sampled_from_s = _busy_s(), perf_counter()
        time.sleep(sample_s)
        now_s = perf_counter()
        busy_cores = (_busy_s() - before_s) / (now_s - sampled_from_s)
        if busy_cores <= _QUIET_CORES or now_s - start_s >= limit_s:
            return QuietWait(round(now_s - start_s, 1), round(busy_cores, 2))


def _busy_s() -> float:
    """CPU seconds that all processes used since boot: user, nice, system, irq, softirq."""
    with open("/proc/stat") as stat:
        user, nice, system, _, _, irq, softirq = map(int, stat.readline().split()[1:8])
    return (user + nice + system + irq + softirq) / _TICKS_PER_S


class CoreWatch:
    """One phase at a time: `start`, samples, `stop`. `server_pids` are the roots of the servers under test.

    The client is this process, and the children that it awaits during the phase.
    """

    def __init__(self, server_pids: Callable[[], Iterable[int]]) -> None:
        self._server_pids = server_pids
        self._used_s: dict[int, tuple[float, float]] = {}  # pid -> CPU seconds when first and last seen
        self._start_s = 0.0
        self._start_busy_s = 0.0
        self._start_children_s = 0.0

    def start(self) -> None:
        self._used_s.clear()
        self._start_s, self._start_busy_s = perf_counter(), _busy_s()
        self._start_children_s = _ended_children_s()
        self.sample(is_first=True)

    async def keep_sampling(self, every_s: float = 2.0) -> None:
        """A process that ends between two samples loses what it used since the last one."""
        while True:
            await asyncio.sleep(every_s)
            self.sample()

    def stop(self) -> CoreUse:
        self.sample()
        elapsed_s = max(perf_counter() - self._start_s, 1e-9)
        used_s = {pid: last_s - first_s for pid, (first_s, last_s) in self._used_s.items()}
        client_s = used_s.pop(os.getpid()) + _ended_children_s() - self._start_children_s
        server_s = sum(used_s.values())
        foreign_s = max(0.0, _busy_s() - self._start_busy_s - client_s - server_s)
        return CoreUse(*(round(seconds / elapsed_s, 3) for seconds in (client_s, server_s, foreign_s)))

    def sample(self, *, is_first: bool = False) -> None:
        table = processes()
        for process in [table[os.getpid()], *process_tree(self._server_pids(), table)]:
            # A process that began during the phase counts from 0.
            first_s, _ = self._used_s.get(process.pid, (process.cpu_s if is_first else 0.0, 0.0))
            self._used_s[process.pid] = (first_s, process.cpu_s)


def _ended_children_s() -> float:
    """CPU seconds of all children that have ended and were awaited, with their own such children."""
    times = os.times()
    return times.children_user + times.children_system
