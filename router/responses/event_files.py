"""The events of background responses that stream: files that outlive the router which writes them.

    run ─> EventFile.add ─> NAME ─> EventReader, of any router: whole events behind the last that a client has

The number of an event is its place in the file, from 0 on. One that is torn, as a death may leave it, is told to nobody
and cut off by the router that goes on. Nothing waits for the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from pathlib import Path

import structlog

from ..kept.answer_log import MAX_BYTES as MAX_BYTES_OF_ONE
from ..kept.files import make_folder
from ..kept.sweeper import Sweeper
from .store import MAX_AGE_S, MAX_BYTES_OF_FOLDER
from .task_folder import unlink_unless_under_way

_END = b"\n\n"  # of an event; JSON has none
_LAST_EVENTS = tuple(b"event: response.%b\n" % kind for kind in (b"completed", b"incomplete", b"failed"))
_READ_BYTES = 2**16

log = structlog.get_logger(__name__)


async def comes_within(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait for it so long. Returns whether it has come."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
    return event.is_set()


class EventFile:
    """`EventFile` is what a run writes to. Belongs to a loop."""

    def __init__(self, path: Path, fd: int, num_events: int = 0, *, has_last: bool = False) -> None:
        """`num_events`: those that are there; `has_last`: the answer's last one is among them."""
        self._path = path
        self._fd = fd
        self._num_bytes = os.fstat(fd).st_size
        self._grown = asyncio.Event()
        self.num_events = num_events
        self.has_last = has_last
        self.is_kept = True

    def add(self, part: bytes) -> None:
        """Append whole events, or the next part of a long one. What cannot be kept is told to nobody."""
        if not self.is_kept:
            return
        try:
            if self._num_bytes + len(part) > MAX_BYTES_OF_ONE:
                raise OSError(f"the events take more than {MAX_BYTES_OF_ONE} bytes")
            if os.write(self._fd, part) < len(part):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.is_kept = False
            with contextlib.suppress(OSError):  # the answer goes on, though its disk may be mounted for reading only
                self._path.unlink(missing_ok=True)
            log.warning("events_not_kept", reason=error.strerror or str(error), num_bytes=self._num_bytes)
        self._num_bytes += len(part)
        self._grown.set()
        self._grown = asyncio.Event()

    def add_missing(self, first: bytes) -> None:
        """Append those of an answer's first events that are not there."""
        *events, _ = first.split(_END)
        if missing := events[self.num_events :]:
            self.add(b"".join(event + _END for event in missing))

    async def grows(self, timeout_s: float) -> None:
        """Return when something was added, or after so long."""
        await comes_within(self._grown, timeout_s)

    def close(self) -> None:
        os.close(self._fd)


class EventReader:
    """`EventReader` reads one file for one client, while it may grow."""

    def __init__(self, fd: int, after: int) -> None:
        """`after`: the number of the last event that the client has; -1: it has none."""
        self._fd = fd
        self._at = 0  # the end of the last whole event that was read
        self._num_bytes = _READ_BYTES
        self._num_skipped = after + 1  # to come
        self.last = after  # number of the last event that the client has

    def read(self) -> bytes:
        """Return the next whole events; empty: there are none yet. Raises OSError."""
        while data := os.pread(self._fd, self._num_bytes, self._at):
            end = data.rfind(_END) + len(_END)
            if end < len(_END):
                if len(data) < self._num_bytes:
                    break
                self._num_bytes *= 2  # the event is longer
                continue
            self._at += end
            if events := self._behind(data[:end]):
                return events
        return b""

    def _behind(self, events: bytes) -> bytes:
        """Return those that the client has not."""
        if self._num_skipped:
            *skipped, events = events.split(_END, self._num_skipped)
            self._num_skipped -= len(skipped)
        self.last += events.count(_END)
        return events

    def close(self) -> None:
        os.close(self._fd)


class EventFolder:
    """`EventFolder` is one router's view of the files."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES_OF_FOLDER) -> None:
        """Raises ConfigError for a folder that cannot be made."""
        self._path = path
        self.sweeper = Sweeper(path, MAX_AGE_S, max_bytes, unlink_unless_under_way)
        make_folder(path)

    def create(self, name: str, events: bytes) -> EventFile:
        """Begin a response's events with these. Raises OSError."""
        self.sweeper.now_and_then()
        path = self._path / name
        file = EventFile(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600))
        file.add(events)
        if not file.is_kept:
            file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return file

    def go_on(self, name: str) -> EventFile | None:
        """Return the file for who goes on with it; None: the response does not stream. Raises OSError."""
        path = self._path / name
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            *events, torn = path.read_bytes().split(_END)
            os.ftruncate(fd, os.fstat(fd).st_size - len(torn))
            has_last = bool(events) and any(last in events[-1] for last in _LAST_EVENTS)
            return EventFile(path, fd, len(events), has_last=has_last)
        except BaseException:
            os.close(fd)
            raise

    def reader(self, name: str, after: int) -> EventReader | None:
        """Return None where the response does not stream, or its events are not kept any more. Raises OSError."""
        try:
            return EventReader(os.open(self._path / name, os.O_RDONLY | os.O_CLOEXEC), after)
        except FileNotFoundError:
            return None

    def delete(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)
