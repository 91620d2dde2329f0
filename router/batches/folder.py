"""The folder in which files and batches outlive a router.

    files/ID.json, ID.data    a file: what is known of it, its bytes
    batches/ID/batch.json     a batch's record           lock     held by the router that runs it
               input.jsonl    its input, a second name   cancel   there once somebody asked to cancel it
               journal        its finished lines
    parts/                    what is being written; renamed to its place when it is whole

A name in its place is a whole file, whenever the router was killed. Functions here wait for the disk: they are called
on threads.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec
import structlog

from ...common.errors import RequestError
from ..kept.files import make_usable

JOURNAL = "journal"
JOURNAL_COPIES = 2  # it counts so often: its answers are written into files before it goes
_PART_AGE_S = 3600.0  # what nobody has written to for so long was left by a router that was killed
# Of the disk: answers that are under way have room in it, and so have records. Of a small one this share.
_SPARE_BYTES, _SPARE_SHARE = 64 * 2**20, 1 / 16

T = TypeVar("T")

log = structlog.get_logger(__name__)


class DataFolder:
    """One folder, perhaps of several routers. Raises ConfigError where it cannot be used."""

    def __init__(self, path: Path, *, max_bytes: int, retention_s: float) -> None:
        self.path = path
        self.files, self.batches, self._parts = path / "files", path / "batches", path / "parts"
        self.max_bytes = max_bytes
        self.retention_s = retention_s
        self.num_incoming = 0  # bytes that come through this router, of uploads and of batches' answers
        self.num_arrived = 0  # these, and those of what was kept
        self.room: Room | None = None  # when it was last measured for the batches that run; None: it was not yet
        self._unread: set[Path] = set()  # records of which a line in the log tells that nobody can read them
        make_usable("data_dir", path, self.files, self.batches, self._parts, written=self._parts)
        self.sweep_parts()

    def new_part(self) -> Path:
        """Return a name for something that is about to be written."""
        return self._parts / secrets.token_hex(12)

    def write(self, target: Path, data: bytes, *, lasts: bool = True) -> None:
        """Replace a file by another at once. `lasts`: it is there after a power failure too."""
        part = self.new_part()
        try:
            with part.open("wb") as file:
                file.write(data)
                if lasts:
                    sync(file)
            self.place(part, target, lasts=lasts)
        except OSError:
            part.unlink(missing_ok=True)
            raise

    def place(self, part: Path, target: Path, *, lasts: bool = True) -> None:
        """Give what was written its name."""
        part.replace(target)
        if lasts:
            sync_folder(target.parent)

    def record(self, path: Path, kind: type[T]) -> T | None:
        """Return what a record says; None where there is none, or what is there is none. Raises OSError."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._tell_unread(path, str(error))
            return None

    def records(self, paths: Iterable[Path], kind: type[T]) -> Iterator[T]:
        """Yield the records that can be read: one that cannot be hides no other."""
        for path in paths:
            try:
                record = self.record(path, kind)
            except OSError as error:
                self._tell_unread(path, error.strerror or str(error))
                continue
            if record is not None:
                yield record

    def _tell_unread(self, path: Path, why: str) -> None:
        """Tell once: it is looked at again every second."""
        if path not in self._unread:
            self._unread.add(path)
            log.error("record_unreadable", path=str(path), error=why)

    @property
    def is_full(self) -> bool:
        """Tell whether batches may add no more, as far as is known."""
        return self.room is not None and self.room.is_used_up

    def add_answer(self, answer: bytes) -> None:
        """Count what is about to be added to a journal."""
        self.num_incoming += JOURNAL_COPIES * len(answer)
        self.num_arrived += JOURNAL_COPIES * len(answer)

    def drop_answers(self, answers: Iterable[bytes]) -> None:
        """Count them no longer: a journal has them now."""
        self.num_incoming -= JOURNAL_COPIES * sum(map(len, answers))

    def num_bytes(self) -> int:
        """Return what everything takes that is whole, or will be. A file with two names counts once."""
        entries = [*_entries(self.files), *_entries(self.batches)]
        return sum({entry.inode: entry.num_bytes for entry in entries}.values())

    def sweep_parts(self) -> None:
        """Remove what routers have left half-written."""
        oldest_s = time.time() - _PART_AGE_S
        for part in list(self._parts.iterdir()):
            try:
                if part.stat().st_mtime < oldest_s:
                    part.unlink()
            except FileNotFoundError:
                continue  # it is in its place now


class Room:
    """`Room` is what may be added to a folder: measured once, less what has come through this router since."""

    def __init__(self, folder: DataFolder) -> None:
        """Call where bytes are counted as they come, and `measure` on a thread."""
        self._folder = folder
        # Of this moment: an upload that finds its place while the folder is measured rather counts twice than never.
        self._num_before, self._num_arrived = folder.num_incoming, folder.num_arrived
        self._num_bytes = self._num_free = 0

    def measure(self) -> None:
        """Waits for the disk."""
        self._num_bytes = self._folder.max_bytes - self._folder.num_bytes() - self._num_before
        disk = shutil.disk_usage(self._folder.path)
        self._num_free = disk.free - min(_SPARE_BYTES, int(_SPARE_SHARE * disk.total))

    @property
    def num_bytes(self) -> int:
        """Return how many may come, by the folder's bound. Negative: more has come than might."""
        return self._num_bytes - self._num_come

    @property
    def is_used_up(self) -> bool:
        """Tell whether the folder's bound, or its disk, leaves nothing to add."""
        return self.num_bytes <= 0 or self._num_free <= self._num_come

    def refusal(self) -> RequestError:
        """Return the refusal of what has no room: by the folder's bound, or else by its disk."""
        return no_room(self._folder.max_bytes) if self.num_bytes <= 0 else disk_full()

    @property
    def _num_come(self) -> int:
        return self._folder.num_arrived - self._num_arrived


def sync(file: BinaryIO) -> None:
    """Make what was written last."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder last."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def no_room(max_bytes: int) -> RequestError:
    """Return the refusal of what would fill the folder."""
    return _refusal(f"the server's folder for files holds {max_bytes} bytes and has no room for this: delete files")


def disk_full() -> RequestError:
    """Return the refusal of what the disk has no room for, which the folder's bound does not tell."""
    return _refusal("the disk of the server's folder for files is full")


def _refusal(text: str) -> RequestError:
    return RequestError(text, code="insufficient_storage", status=507, kind="server_error")


class _Entry:
    __slots__ = ("inode", "num_bytes")

    def __init__(self, stat: os.stat_result, num_copies: int) -> None:
        self.inode = (stat.st_dev, stat.st_ino)
        self.num_bytes = num_copies * stat.st_size


def _entries(path: Path) -> Iterator[_Entry]:
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    yield from _entries(Path(entry.path))
                else:
                    yield _Entry(entry.stat(follow_symlinks=False), JOURNAL_COPIES if entry.name == JOURNAL else 1)
            except FileNotFoundError:
                continue  # it has just been deleted
