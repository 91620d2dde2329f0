"""One rank's file of KV blocks on the local disk, and the thread that reads and writes it.

    header   what the blocks belong to: model, layout, rank, sizes; with several ranks, the set that the file is of
    index    a row for each slot: the block's hash, the XXH3 of its bytes, the XXH3 of this row
    data     the slots

The file is the process's alone (locked, 0600 in a directory of 0700) and outlives it: a worker that starts again
with the same model goes on with what it finds. Nothing is synced, for nothing has to be: a block is written before its
row, and each is checked when it is read, so whatever a crash left half done is a miss.
"""

from __future__ import annotations

import fcntl
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from ..common.config import EngineConfig
from ..common.errors import ConfigError
from .disk_layout import ALIGN, ROW, DiskLayout, DiskSet
from .disk_tier import SPOILT, DiskResult, DiskTask

_MAX_FILES = 256  # workers of one machine that share a directory


class DiskFile:
    """Slots of equal size. Raises OSError where the disk does."""

    def __init__(self, fd: int, layout: DiskLayout, belongs_to: DiskSet, *, is_new: bool) -> None:
        """`fd`: of a file that `open_file` has made; `is_new`: just now."""
        self.num_slots = layout.num_slots
        self.belongs_to = belongs_to
        self.is_new = is_new
        self._fd = fd
        self._layout = layout
        self._slot_bytes = layout.slot_bytes
        self._data_start = layout.data_start
        rows = os.pread(fd, self.num_slots * ROW.itemsize, ALIGN).ljust(self.num_slots * ROW.itemsize, b"\0")
        self._rows = np.frombuffer(bytearray(rows), dtype=ROW)

    def begin_anew(self) -> None:
        """Be the first file of another set, without a block."""
        self.belongs_to = DiskSet(self._layout.new_set(), self.belongs_to.number)
        self.is_new = True
        self._rows[:] = np.zeros(1, dtype=ROW)
        _write_all(self._fd, memoryview(self._layout.head(self.belongs_to.name)), 0)
        _write_all(self._fd, memoryview(self._rows.tobytes()), ALIGN)

    def stored(self) -> Iterator[tuple[bytes, int]]:
        """Hash and slot of what an earlier process has left. Of two equal ones, the first."""
        seen = set()
        rows, checks = self._rows.tobytes(), self._rows["check"].tolist()
        for slot in np.flatnonzero(self._rows["check"]).tolist():
            row = rows[slot * ROW.itemsize : (slot + 1) * ROW.itemsize]
            if checks[slot] == _check(slot, row) and (block_hash := row[:16]) not in seen:
                seen.add(block_hash)
                yield block_hash, slot

    def write(self, slot: int, block_hash: bytes, data: memoryview) -> None:
        row = self._rows[slot : slot + 1]
        row["hash"], row["sum"] = np.void(block_hash), xxhash.xxh3_64_intdigest(data, slot)
        row["check"] = _check(slot, row.tobytes())
        _write_all(self._fd, data, self._data_start + slot * self._slot_bytes)
        _write_all(self._fd, memoryview(row.tobytes()), ALIGN + slot * ROW.itemsize)

    def read(self, slot: int, block_hash: bytes, into: memoryview) -> bool:
        """Read a slot. False: it is not the block that was written there."""
        row = self._rows[slot]
        if row["hash"].tobytes() != block_hash:
            return False
        os.preadv(self._fd, [into], self._data_start + slot * self._slot_bytes)
        return xxhash.xxh3_64_intdigest(into, slot) == int(row["sum"])

    def close(self) -> None:
        os.close(self._fd)


def _check(slot: int, row: bytes) -> int:
    return xxhash.xxh3_64_intdigest(row[:24], slot + 1)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def open_file(
    config: EngineConfig, fingerprint: str, *, slot_bytes: int, rank: int, tp_size: int, wanted: DiskSet | None = None
) -> DiskFile:
    """Open a rank's file as the settings ask for it, with all the room that it needs. Raises ConfigError.

    `wanted`: of the file that rank 0 has opened, for the other ranks.
    """
    assert config.disk_cache_dir is not None
    num_slots = config.disk_cache_bytes // slot_bytes
    if num_slots < 1:
        raise ConfigError(f"disk_cache_bytes: {config.disk_cache_bytes:,} is less than a block's {slot_bytes:,} bytes")
    directory = _private_directory(config.disk_cache_dir)
    layout = DiskLayout(fingerprint, rank, tp_size, num_slots, slot_bytes)

    def our_set(head: bytes) -> str | None:
        name = layout.set_of(head)
        return name if wanted is None or name == wanted.name else None

    def is_ours(head: bytes) -> bool:
        return our_set(head) is not None

    fd, number = _lock_one(directory, layout.file_name, is_ours, wanted.number if wanted is not None else 0)
    try:
        name = our_set(os.pread(fd, ALIGN, 0))
        if is_new := name is None or os.fstat(fd).st_size != layout.num_bytes:
            name = wanted.name if wanted is not None else layout.new_set()
            _make(fd, layout.head(name), layout.num_bytes, directory)
        return DiskFile(fd, layout, DiskSet(name, number), is_new=is_new)
    except BaseException:
        os.close(fd)
        raise


def _private_directory(directory: Path) -> Path:
    """Make the directory, or check that it is ours alone: it holds what users wrote."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(directory)
    except OSError as error:
        raise ConfigError(f"disk_cache_dir: cannot use {directory}: {error.strerror}") from error
    return directory


def check_private(directory: Path) -> None:
    """Refuse a directory that is another user's, or that others may look into. Raises ConfigError and OSError."""
    info = directory.stat()
    if info.st_uid != os.geteuid():
        raise ConfigError(f"disk_cache_dir: {directory} belongs to user {info.st_uid}, not to us ({os.geteuid()})")
    if stat.S_IMODE(info.st_mode) & 0o077:
        raise ConfigError(
            f"disk_cache_dir: others may look into {directory} (mode {stat.S_IMODE(info.st_mode):o}): chmod 700 "
            "it, or name a directory that does not exist yet"
        )


def _lock_one(directory: Path, name: str, is_ours: Callable[[bytes], bool], preferred: int) -> tuple[int, int]:
    """Lock a file of this name that no other process has, and return its number with it: one whose head is ours if
    there is any, else the preferred, else the first.

    So a worker finds its own again, also where one with a tier of another size, which would begin it anew, comes first.
    """
    paths = [directory / f"{name}.{number}.kv" for number in range(_MAX_FILES)]
    ours = [number for number, path in enumerate(paths) if is_ours(_head_of(path))]
    for number in (*ours, preferred, *range(_MAX_FILES)):
        fd = _lock(paths[number])
        if fd is not None:
            return fd, number
    raise ConfigError(f"disk_cache_dir: {_MAX_FILES} processes use {directory} already")


def _head_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(ALIGN)
    except OSError:
        return b""


def _lock(path: Path) -> int | None:
    """Open a file that is ours alone; None: another process has it. Raises ConfigError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"disk_cache_dir: cannot open {path}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError as error:  # as of a network's file system without locks
        os.close(fd)
        raise ConfigError(f"disk_cache_dir: cannot lock {path}: {error.strerror}; take a local disk") from error
    return fd


def _make(fd: int, head: bytes, num_bytes: int, directory: Path) -> None:
    """Make an empty cache of whatever the file was, and take all of its room now: a disk may fill up later."""
    try:
        os.ftruncate(fd, 0)
        room = os.fstatvfs(fd)
        free = room.f_bavail * room.f_frsize
        if num_bytes > free:
            raise ConfigError(
                f"disk_cache_bytes: {num_bytes:,} bytes are needed in {directory}, {free:,} are free; lower it, or "
                "remove files of models that are not served any more"
            )
        os.posix_fallocate(fd, 0, num_bytes)
        os.pwrite(fd, head, 0)
    except OSError as error:
        raise ConfigError(f"disk_cache_dir: no room of {num_bytes:,} bytes in {directory}: {error.strerror}") from error


class DiskThread:
    """One rank's disk: tasks in, results out, one after the other."""

    def __init__(
        self, file: DiskFile, slot_bytes: Callable[[int], memoryview], on_result: Callable[[DiskResult], None]
    ):
        """`slot_bytes`: of a slot in host memory. `on_result` is called on the thread."""
        self._file = file
        self._slot_bytes = slot_bytes
        self._on_result = on_result
        self._tasks: queue.PriorityQueue[tuple[int, int, DiskTask | None]] = queue.PriorityQueue()
        self._num_tasks = 0
        self._thread = threading.Thread(target=self._run, name="kv-disk", daemon=True)
        self._thread.start()

    def submit(self, task: DiskTask) -> None:
        """Queue a task. Reads overtake writes: somebody waits for them."""
        self._put(1 if task.is_write else 0, task)

    def _put(self, order: int, task: DiskTask | None) -> None:
        self._num_tasks += 1
        self._tasks.put((order, self._num_tasks, task))

    def _run(self) -> None:
        while (task := self._tasks.get()[2]) is not None:
            began = time.perf_counter()
            error = self._carry_out(task)
            self._on_result(DiskResult(task, error, time.perf_counter() - began))

    def _carry_out(self, task: DiskTask) -> str:
        """Carry the task out and say why it failed; empty: it has not."""
        data = self._slot_bytes(task.host_slot)
        try:
            if task.is_write:
                self._file.write(task.disk_slot, task.block_hash, data)
            elif not self._file.read(task.disk_slot, task.block_hash, data):
                return SPOILT
        except OSError as error:
            return f"{error.strerror} ({'write' if task.is_write else 'read'})"
        return ""

    def close(self) -> None:
        """End after the task that runs."""
        self._put(-1, None)
        self._thread.join()
        self._file.close()
