"""Batches on disk: their records, who runs each, and who asked to cancel one.

A batch is run by the router that holds its lock, a lock of the kernel: it is free at the moment in which its holder
ends, however it ends. Everybody may read records; the holder alone writes one. Methods wait for the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ...common.errors import RequestError
from ..kept.files import open_locked
from ..state.errors import clip
from .folder import JOURNAL, DataFolder, sync_folder
from .record import CANCELLABLE, BatchRecord

_ID = re.compile(r"batch_[0-9a-f]{32}")
_NEW = "new-"


class BatchLock:
    """The right to run one batch, until it is given back or the process ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        os.close(self._fd)


class BatchStore:
    """The batches of a folder."""

    def __init__(self, folder: DataFolder) -> None:
        self.folder = folder
        self._ended: set[str] = set()  # they are not read again

    def create(self, record: BatchRecord, input_path: Path) -> None:
        """Make the batch's folder, with a name of its own for its input. Raises FileNotFoundError without one."""
        new = self.folder.batches / f"{_NEW}{secrets.token_hex(8)}"
        new.mkdir(mode=0o700)
        try:
            _link(input_path, new / "input.jsonl")
            (new / "lock").touch(mode=0o600)
            self.folder.write(new / "batch.json", msgspec.json.encode(record))
            new.rename(self.path(record.id))
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        sync_folder(self.folder.batches)

    def path(self, batch_id: str) -> Path:
        return self.folder.batches / batch_id

    def input(self, batch_id: str) -> Path:
        return self.path(batch_id) / "input.jsonl"

    def journal(self, batch_id: str) -> Path:
        return self.path(batch_id) / JOURNAL

    def save(self, record: BatchRecord, *, lasts: bool = True) -> None:
        """Write a record. For the holder of its lock."""
        self.folder.write(self.path(record.id) / "batch.json", msgspec.json.encode(record), lasts=lasts)

    def read(self, batch_id: str) -> BatchRecord | None:
        return self.folder.record(self.path(batch_id) / "batch.json", BatchRecord)

    def get(self, batch_id: str, owner: str) -> BatchRecord:
        """Raises RequestError (404) for what is not there, or is somebody else's."""
        record = self.read(batch_id) if _ID.fullmatch(batch_id) else None
        if record is None or record.owner != owner:
            raise RequestError(
                f"there is no batch {clip(batch_id)}", param="batch_id", code="batch_not_found", status=404
            )
        return record

    def owned(self, owner: str) -> list[BatchRecord]:
        """Return the owner's batches, the newest first."""
        found = [record for record in self._all() if record.owner == owner]
        return sorted(found, key=lambda record: (record.created_ns, record.id), reverse=True)

    def unended(self) -> list[BatchRecord]:
        """Return the batches that somebody has to run, the oldest first."""
        found = [record for record in self._all(skip=self._ended) if not record.has_ended]
        return sorted(found, key=lambda record: (record.created_ns, record.id))

    def num_unended(self, owner: str) -> int:
        return sum(record.owner == owner for record in self.unended())

    def _all(self, skip: set[str] | None = None) -> Iterator[BatchRecord]:
        names = [path.name for path in self.folder.batches.iterdir()]
        wanted = [name for name in names if _ID.fullmatch(name) and not (skip and name in skip)]
        for record in self.folder.records([self.path(name) / "batch.json" for name in wanted], BatchRecord):
            if record.has_ended:
                self._ended.add(record.id)
            yield record

    # --- who runs it ----------------------------------------------------------------------------------------

    def lock(self, batch_id: str) -> BatchLock | None:
        """Take a batch that nobody runs. Raises OSError, as where the file system has no locks (now)."""
        try:
            fd = open_locked(self.path(batch_id) / "lock")
        except FileNotFoundError:
            return None
        return None if fd is None else BatchLock(fd)

    # --- who wants no more of it ----------------------------------------------------------------------------

    def ask_to_cancel(self, batch_id: str, owner: str) -> BatchRecord:
        """Tell whoever runs it. Raises RequestError for a batch that cannot be cancelled any more."""
        record = self.get(batch_id, owner)
        if record.status not in CANCELLABLE and self.cancel_asked_s(batch_id) is None:
            raise RequestError(
                f"a batch that is {record.status} cannot be cancelled", param="batch_id", code="batch_not_cancellable"
            )
        with contextlib.suppress(FileExistsError):
            (self.path(batch_id) / "cancel").touch(mode=0o600, exist_ok=False)
        return record

    def cancel_asked_s(self, batch_id: str) -> float | None:
        """Return when it was asked to cancel this batch; None: it was not."""
        try:
            return (self.path(batch_id) / "cancel").stat().st_mtime
        except FileNotFoundError:
            return None

    # --- at its end -----------------------------------------------------------------------------------------

    def clear(self, batch_id: str) -> None:
        """Remove what a batch that has ended needs no more: its files have it."""
        for path in (self.journal(batch_id), self.input(batch_id)):
            path.unlink(missing_ok=True)

    def sweep(self, now_s: float) -> None:
        """Delete batches that ended long ago, and what nobody needs or has created. `now_s`: since 1970."""
        oldest_s = now_s - self.folder.retention_s
        for record in list(self._all()):
            if record.has_ended and record.stamps.get(record.status, record.created_at) < oldest_s:
                shutil.rmtree(self.path(record.id), ignore_errors=True)
                self._ended.discard(record.id)
            elif record.has_ended:  # its router may have been killed in between
                self.clear(record.id)
        for path in list(self.folder.batches.glob(f"{_NEW}*")):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < now_s - 3600:
                    shutil.rmtree(path, ignore_errors=True)


def _link(path: Path, name: Path) -> None:
    """Give a file a second name, or a copy where the file system has none. Raises FileNotFoundError."""
    try:
        os.link(path, name)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(path, name)


def output_id(batch_id: str, kind: str) -> str:
    """Return the id of a batch's file: always the same, so that writing it again replaces it."""
    return "file-" + hashlib.blake2b(f"{batch_id} {kind}".encode(), digest_size=12).hexdigest()
