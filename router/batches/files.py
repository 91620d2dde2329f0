"""Files of clients: uploaded by them, or written for them. Each owner finds its own only.

Methods wait for the disk: they are called on threads.
"""

from __future__ import annotations

import contextlib
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from ...common.errors import RequestError
from ..state.errors import clip
from .folder import DataFolder

INPUT = "batch"  # the purpose of what clients upload
OUTPUT = "batch_output"
_ID = re.compile(r"file-[0-9a-f]{24}")
DAY_S = 86400


class StoredFile(msgspec.Struct, kw_only=True):
    """One file, as `ID.json` says."""

    id: str
    owner: str
    filename: str
    num_bytes: int
    purpose: str
    created_at: int  # seconds since 1970, as all times here
    created_ns: int  # orders files of one second
    expires_at: int

    def shown(self) -> dict[str, object]:
        """Return OpenAI's object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class FileStore:
    """The files of a folder."""

    def __init__(self, folder: DataFolder, now_s: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.hidden_by_s = -math.inf  # what has expired by then: set by who knows whether the wall clock is believed
        self._now_s = now_s

    def add(
        self,
        part: Path,
        *,
        owner: str,
        filename: str,
        purpose: str,
        lifetime_s: float | None = None,
        file_id: str | None = None,
    ) -> StoredFile:
        """Take a part that is whole and synced. With a `file_id` that is there already, it is replaced."""
        now_s = self._now_s()
        stored = StoredFile(
            id=file_id or f"file-{secrets.token_hex(12)}",
            owner=owner,
            filename=filename,
            num_bytes=part.stat().st_size,
            purpose=purpose,
            created_at=int(now_s),
            created_ns=int(now_s * 1e9),
            expires_at=int(now_s + min(lifetime_s or self.folder.retention_s, self.folder.retention_s)),
        )
        self.folder.place(part, self._data(stored.id))
        try:
            self.folder.write(self._about(stored.id), msgspec.json.encode(stored))
        except OSError:
            if file_id is None:  # nobody knows of its bytes
                self._data(stored.id).unlink(missing_ok=True)
            raise
        return stored

    def get(self, file_id: str, owner: str, param: str = "id") -> StoredFile:
        """Raises RequestError (404), which names `param`, for what is not there, or is somebody else's."""
        stored = self.folder.record(self._about(file_id), StoredFile) if _ID.fullmatch(file_id) else None
        if stored is None or stored.owner != owner or stored.expires_at <= self.hidden_by_s:
            raise no_file(file_id, param)
        return stored

    def path(self, stored: StoredFile) -> Path:
        return self._data(stored.id)

    def owned(self, owner: str, purpose: str | None = None) -> list[StoredFile]:
        """Return the owner's files, the newest first."""
        found = [each for each in self._all() if each.owner == owner and each.expires_at > self.hidden_by_s]
        if purpose is not None:
            found = [each for each in found if each.purpose == purpose]
        return sorted(found, key=lambda each: (each.created_ns, each.id), reverse=True)

    def delete(self, file_id: str, owner: str) -> None:
        """Raises RequestError (404). A batch that reads the file keeps it under a name of its own."""
        self._remove(self.get(file_id, owner).id)

    def sweep(self, now_s: float) -> None:
        """Delete what has expired, and bytes of which nothing is known. `now_s`: since 1970."""
        for stored in self._all():
            if stored.expires_at <= now_s:
                self._remove(stored.id)
        for path in list(self.folder.files.glob("*.data")):
            with contextlib.suppress(FileNotFoundError):
                if not path.with_suffix(".json").exists() and path.stat().st_mtime < now_s - DAY_S:
                    path.unlink()

    def _remove(self, file_id: str) -> None:
        self._about(file_id).unlink(missing_ok=True)  # from here on it is nobody's
        self._data(file_id).unlink(missing_ok=True)

    def _about(self, file_id: str) -> Path:
        return self.folder.files / f"{file_id}.json"

    def _data(self, file_id: str) -> Path:
        return self.folder.files / f"{file_id}.data"

    def _all(self) -> Iterator[StoredFile]:
        return self.folder.records(list(self.folder.files.glob("*.json")), StoredFile)


def no_file(file_id: str, param: str = "id") -> RequestError:
    """Return the refusal of what is not there, or is somebody else's."""
    return RequestError(f"there is no file {clip(file_id)}", param=param, code="file_not_found", status=404)
