"""Memory in which the routers of one launcher keep what each key has used, so that its limits hold for all of them.

    launcher: QuotaBoard.create(number of routers) -> its path, in the routers' settings
    router:   QuotaBoard.open(path) -> rows, each of one tenant, read and written under a lock

    header   who counts in which column (process ids, 0: nobody)
    a row    the tenant's digest, two buckets (level, when it was that: seconds of the system's clock), and for each
             column how many requests run there

A router that died leaves a column behind, which the next one clears and takes. Until then its requests count only as
long as the limit is not reached (`living`). The lock is held for microseconds; where somebody is stopped who holds it
the others go on without, for a limit that is a request off hurts less than a router that stands still. Anonymous memory
of the launcher: it is gone when the last of them is.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ..common.router_config import RouterConfig
from .locks import lock

NUM_ROWS = 16_384  # more than a file of keys may have
KEY_BYTES = 16
_WAIT_S, _LOOK_EVERY_S = 0.01, 0.0001  # for the lock: a router's loop stands still meanwhile
_COUNT = struct.Struct("<i")
_BUCKETS = struct.Struct("<4d")


@dataclass(slots=True)
class BoardRow:
    """A `BoardRow` says what a tenant has used."""

    buckets: tuple[float, float, float, float] | None  # level and time of that of requests, then of tokens; None: new
    running: list[int]  # requests, by column


class QuotaBoard:
    """Used by one thread."""

    def __init__(self, fd: int) -> None:
        """Take over the descriptor of a board."""
        self._fd = fd
        self._memory = mmap.mmap(fd, os.fstat(fd).st_size)
        (self._num_columns,) = _COUNT.unpack_from(self._memory)
        self._row = _row_of(self._num_columns)
        self._first_row = _COUNT.size * (1 + self._num_columns)
        self._is_kept = False  # the lock, by somebody who stands still: until it is free, nobody waits for it

    @classmethod
    def create(cls, num_routers: int) -> Self:
        """Make one with a second column for each router, as one that is replaced runs on beside the next one."""
        num_columns = 2 * num_routers
        fd = os.memfd_create("kvferry-quotas")
        os.ftruncate(fd, _COUNT.size * (1 + num_columns) + NUM_ROWS * _row_of(num_columns).size)
        os.pwrite(fd, _COUNT.pack(num_columns), 0)
        return cls(fd)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises OSError where the launcher's memory cannot be reached."""
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    @property
    def path(self) -> Path:
        """Return where the launcher's children find it while it lives."""
        return Path(f"/proc/{os.getpid()}/fd/{self._fd}")

    def close(self) -> None:
        self._memory.close()
        os.close(self._fd)

    def claim(self) -> int:
        """Return a column that nobody counts in, cleared. Raises OSError where there is none."""
        with self.locked():
            for column in range(self._num_columns):
                pid = self._pid(column)
                if pid == os.getpid() or not _runs(pid):
                    _COUNT.pack_into(self._memory, _COUNT.size * (1 + column), os.getpid())
                    self._clear(column)
                    return column
        raise OSError("every column of the board is taken")

    def _pid(self, column: int) -> int:
        (pid,) = _COUNT.unpack_from(self._memory, _COUNT.size * (1 + column))
        return int(pid)

    def _clear(self, column: int) -> None:
        for row in range(NUM_ROWS):
            self._count(self._first_row + row * self._row.size, column, 0)

    def _count(self, place: int, column: int, count: int) -> None:
        _COUNT.pack_into(self._memory, place + KEY_BYTES + _BUCKETS.size + _COUNT.size * column, count)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        within_s = 0.0 if self._is_kept else _WAIT_S
        self._is_kept = not lock(self._fd, within_s=within_s, look_every_s=_LOOK_EVERY_S)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # this process's own, if it has it

    def find(self, key: bytes) -> tuple[int, BoardRow]:
        """Return where a tenant's row is, made if need be, and what it says.

        A board without room forgets who stands where a newcomer belongs.
        """
        first = int.from_bytes(key[:4], "little") % NUM_ROWS
        for step in range(NUM_ROWS):
            place = self._first_row + (first + step) % NUM_ROWS * self._row.size
            held, *buckets_and_counts = self._row.unpack_from(self._memory, place)
            if held == key:
                level, at, other_level, other_at, *running = buckets_and_counts
                return place, BoardRow((level, at, other_level, other_at), running)
            if not any(held):
                break
        else:
            place = self._first_row + first * self._row.size
        running = [0] * self._num_columns
        self._row.pack_into(self._memory, place, key, 0.0, 0.0, 0.0, 0.0, *running)
        return place, BoardRow(None, running)

    def living(self, running: list[int]) -> list[int]:
        """Return a row's counts without those of routers that died: what they had running has ended."""
        return [count if count and _runs(self._pid(column)) else 0 for column, count in enumerate(running)]

    def put(self, place: int, row: BoardRow, column: int) -> None:
        """Write what a row's buckets hold, and one count: the others may be changed meanwhile, by who has no lock."""
        assert row.buckets is not None
        _BUCKETS.pack_into(self._memory, place + KEY_BYTES, *row.buckets)
        self._count(place, column, row.running[column])


def has_quotas(config: RouterConfig) -> bool:
    """Tell whether keys have limits."""
    limits = (config.max_concurrency_per_key, config.requests_per_minute_per_key, config.tokens_per_minute_per_key)
    return any(limit is not None for limit in limits)


def _row_of(num_columns: int) -> struct.Struct:
    return struct.Struct(f"<{KEY_BYTES}s4d{num_columns}i")


def _runs(pid: int) -> bool:
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
