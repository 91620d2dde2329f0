"""Stores keep what `/v1/responses` answered, each as bytes under a name, bounded in size and time.

    FolderStore   files, which the routers of one folder share, and which outlive each of them
    MemoryStore   this router's own memory, where there is no folder

The oldest leave first, but for the state of what is under way. What a client is told of is there before it is told.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

from ...common.clock import Clock
from ..kept.files import make_folder
from ..kept.sweeper import Sweeper
from .task_folder import unlink_unless_under_way

MAX_BYTES_OF_FOLDER = 256 * 2**20  # more keeps them longer under load
MAX_BYTES_OF_MEMORY = 64 * 2**20
MAX_AGE_S = 86_400.0
_ENTRY_BYTES = 512  # of one in memory, beside its data


class ResponseStore(Protocol):
    """`ResponseStore` is written by the router's loop, and may be read by any thread."""

    def write(self, name: str, data: bytes) -> None:
        """Raises OSError."""

    def read(self, name: str) -> memoryview | None:
        """Return None for what is not here (any more). The data stays readable while somebody has it."""

    def size(self, name: str) -> int:
        """Return how many bytes there are to read."""

    def delete(self, name: str) -> None:
        """Forget what is there."""


class FolderStore:
    """A file is written beside its name and gets it when it is whole. Nothing waits for the disk."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES_OF_FOLDER) -> None:
        """Raises ConfigError for a folder that cannot be made."""
        self._path = path
        self.sweeper = Sweeper(path, MAX_AGE_S, max_bytes, unlink_unless_under_way)
        make_folder(path)

    def write(self, name: str, data: bytes) -> None:
        new = self._path / f"{name}-{os.getpid()}"
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(data)
            new.replace(self._path / name)
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink()
            raise
        self.sweeper.now_and_then()

    def read(self, name: str) -> memoryview | None:
        """Read all of it, though few parts may be looked at: a disk that fails would end whoever had it mapped."""
        try:
            with (self._path / name).open("rb", buffering=0) as file:
                is_old = os.fstat(file.fileno()).st_mtime < time.time() - MAX_AGE_S
                return None if is_old else memoryview(file.readall())
        except FileNotFoundError:
            return None

    def size(self, name: str) -> int:
        try:
            return (self._path / name).stat().st_size
        except FileNotFoundError:
            return 0

    def delete(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)


class MemoryStore:
    """`MemoryStore` is forgotten with its router."""

    def __init__(self, clock: Clock, max_bytes: int = MAX_BYTES_OF_MEMORY) -> None:
        self._clock = clock
        self._max_bytes = max_bytes
        self._by_name: OrderedDict[str, tuple[float, bytes]] = OrderedDict()  # when it came; the oldest first
        self.num_bytes = 0

    def write(self, name: str, data: bytes) -> None:
        self.delete(name)
        self._by_name[name] = self._clock.now(), data
        self.num_bytes += len(data) + _ENTRY_BYTES
        while self._by_name:
            oldest, (kept_s, _) = next(iter(self._by_name.items()))
            if self.num_bytes <= self._max_bytes and kept_s >= self._oldest_s():
                return
            self.delete(oldest)

    def read(self, name: str) -> memoryview | None:
        kept_s, data = self._by_name.get(name, (float("-inf"), b""))
        return None if kept_s < self._oldest_s() else memoryview(data)

    def size(self, name: str) -> int:
        return len(self._by_name.get(name, (0.0, b""))[1])

    def delete(self, name: str) -> None:
        _, data = self._by_name.pop(name, (0.0, None))
        if data is not None:
            self.num_bytes -= len(data) + _ENTRY_BYTES

    def _oldest_s(self) -> float:
        return self._clock.now() - MAX_AGE_S
