"""A folder of files that nobody may need any more: the old ones are deleted, and the oldest where all take too much."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..state.errors import log_failure

_EVERY_S = 10.0
_BLOCK_BYTES = 4096


class Sweeper:
    """`Sweeper` looks through the folder on a thread, when it is told that files come. Belongs to a loop."""

    def __init__(self, path: Path, keep_s: float, max_bytes: int, delete: Callable[[Path], bool]) -> None:
        """`keep_s`: since a file was written to. `delete` tells whether it has deleted one, which may be in use."""
        self._path = path
        self._keep_s = keep_s
        self._max_bytes = max_bytes
        self._delete = delete
        self._swept_s = float("-inf")
        self.sweeping: asyncio.Future[None] | None = None  # the last one

    def now_and_then(self) -> None:
        """Sweep, unless that was done a moment ago."""
        now_s = time.monotonic()
        if now_s - self._swept_s >= _EVERY_S:
            self._swept_s = now_s
            self.sweeping = asyncio.ensure_future(asyncio.to_thread(self.sweep))

    def sweep(self) -> None:
        """Delete what is too old or too much. A folder that has gone needs it no more."""
        try:
            entries = sorted(_entries(self._path), key=lambda entry: entry.stat().st_mtime)
        except FileNotFoundError:
            return
        except OSError as error:
            log_failure("folder_not_swept", error)
            return
        num_bytes, oldest_s = sum(map(_num_bytes, entries)), time.time() - self._keep_s
        for entry in entries:
            if entry.stat().st_mtime >= oldest_s and num_bytes <= self._max_bytes:
                break
            with contextlib.suppress(OSError):
                if self._delete(Path(entry.path)):
                    num_bytes -= _num_bytes(entry)


def _num_bytes(entry: os.DirEntry[str]) -> int:
    """Return what a file takes: a small one a block."""
    return max(_BLOCK_BYTES, entry.stat().st_size)


def _entries(path: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    entry.stat(follow_symlinks=False)  # kept in the entry: it may be deleted at any moment
                    yield entry
