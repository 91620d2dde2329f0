"""Named points at which a test or an operator's drill makes a process die, stop or go wrong.

    KVFERRY_FAILPOINTS="prefill.chunk=kill@3, d-0/decode.step=exit@5"   read once, when the process starts
    KVFERRY_FAILPOINTS="@/path/to/file"                                 the same text in a file, which may come later

    entry   [worker/]point=action[@count][:value]
    count   acts at this hit of the point, 1 by default; `*`: at each
    value   counts only hits that carry this number, such as a token id

A file arms processes that run: it is read when it appears and when it changes, and counting begins there. Who acts
first removes it, so that one file is one fault in one process; with a count of `*` it stays. Without the variable a
point costs a look at `armed`. What a point stands for is written where it is hit.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .errors import ConfigError, KVFerryError

POINTS = frozenset(
    {
        "worker.start",  # the model is loaded, nothing is served yet
        "grant.issued",  # blocks are reserved, the router does not know
        "prefill.chunk",  # before a chunk is computed
        "transfer.write",  # before a write is posted
        "transfer.posted",  # after it
        "transfer.arrived",  # before the arrival is told
        "fetch.lent",  # blocks are pinned for a reader, which does not know
        "fetch.read",  # before a read is posted
        "fetch.done",  # it has ended and was not looked at
        "kv.corrupt",  # KV has arrived and was not looked at
        "decode.adopt",  # before a sequence is taken over
        "decode.step",  # before a step, with the tokens of its rows as values
        "decode.stepped",  # after it, before its tokens are sent
    }
)
EXIT_CODE = 1
_SLOW_S = 0.004  # many times what a small model's step takes
_MEMORY_SLACK_BYTES = 32 << 20
_PIECE_BYTES = 1 << 20
_ENTRY = re.compile(
    r"(?:(?P<worker>[\w.:-]+)/)?(?P<point>[a-z.]+)=(?P<action>[a-z]+)(?:@(?P<count>\*|[1-9]\d{0,8}))?(?::(?P<value>\d{1,9}))?"
)


class Failpoint(KVFerryError):
    """The action `raise` raises this error."""


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _exit() -> None:
    os._exit(EXIT_CODE)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _raise() -> None:
    raise Failpoint("a failpoint")


def _slow() -> None:
    time.sleep(_SLOW_S)


def _run_out_of_memory() -> None:
    """Take what a limit on the address space leaves, until the kernel refuses: MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY_SLACK_BYTES, hard))
    taken: list[bytearray] = []
    while True:
        taken.append(bytearray(_PIECE_BYTES))


_ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "exit": _exit,
    "stop": _stop,
    "raise": _raise,
    "slow": _slow,
    "memory": _run_out_of_memory,
    "flip": lambda: None,  # the caller spoils its own data
}


class Entry(NamedTuple):
    worker: str | None  # None: any
    point: str
    action: str
    at: int | None  # the hit that it acts at; None: each
    value: int | None


def parse(text: str) -> list[Entry]:
    """Raises ConfigError for anything that would otherwise never act, or act elsewhere."""
    return [_parse_entry(part.strip()) for part in text.split(",") if part.strip()]


def _parse_entry(text: str) -> Entry:
    match = _ENTRY.fullmatch(text)
    if match is None:
        raise ConfigError(f"failpoint {text!r}: expected [worker/]point=action[@count][:value]")
    if match["point"] not in POINTS:
        raise ConfigError(f"failpoint {text!r}: unknown point; known are {', '.join(sorted(POINTS))}")
    if match["action"] not in _ACTIONS:
        raise ConfigError(f"failpoint {text!r}: unknown action; known are {', '.join(_ACTIONS)}")
    count = None if match["count"] == "*" else int(match["count"] or 1)
    value = None if match["value"] is None else int(match["value"])
    return Entry(match["worker"], match["point"], match["action"], count, value)


@dataclass(slots=True)
class _Armed:
    entry: Entry
    num_hits: int = 0

    def counts(self, values: Iterable[int]) -> bool:
        """Count this hit, and tell whether the failpoint acts at it."""
        if self.entry.value is not None and self.entry.value not in values:
            return False
        self.num_hits += 1
        return self.entry.at in (None, self.num_hits)


class Failpoints:
    """One process's points. Thread-safe: points are hit on every thread."""

    def __init__(self, text: str, worker_id: str) -> None:
        self._worker_id = worker_id
        self._lock = threading.Lock()
        self._file = Path(text[1:]) if text.startswith("@") else None
        self._read_version: tuple[int, int] | None = None
        self._armed = [] if self._file is not None else self._mine(text)

    def hit(self, point: str, values: Iterable[int] = ()) -> bool:
        """Act if it is time. True: the caller shall spoil what it has in hand."""
        with self._lock:
            self._read_file()
            due = [armed.entry for armed in self._armed if armed.entry.point == point and armed.counts(values)]
            due = [entry for entry in due if entry.at is None or self._claim()]
        for entry in due:
            _ACTIONS[entry.action]()
        return bool(due)

    def _mine(self, text: str) -> list[_Armed]:
        return [_Armed(entry) for entry in parse(text) if entry.worker in (None, self._worker_id)]

    def _read_file(self) -> None:
        if self._file is None:
            return
        try:
            status = self._file.stat()
            version = (status.st_ino, status.st_mtime_ns)
            if version != self._read_version:
                self._armed = self._mine(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            version, self._armed = None, []
        self._read_version = version

    def _claim(self) -> bool:
        """Win or lose the turn: of all processes that share a file, one acts."""
        if self._file is not None:
            try:
                self._file.unlink()
            except FileNotFoundError:
                return False
        return True


armed = False  # looked at before each `hit`
_failpoints = Failpoints("", "")


def arm(text: str, worker_id: str) -> None:
    """Once, when the process starts; empty text leaves every point without effect. Raises ConfigError."""
    global armed, _failpoints
    _failpoints = Failpoints(text.strip(), worker_id)
    armed = bool(text.strip())


def hit(point: str, values: Iterable[int] = ()) -> bool:
    """Tell the armed points that the process has come to `point`. True: spoil what is in hand (`flip`)."""
    assert point in POINTS, point
    return _failpoints.hit(point, values)
