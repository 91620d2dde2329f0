"""The folder of responses that are being computed for clients that do not wait: who computes each, who cancels one.

    NAME          what was asked, locked (flock) by the router that computes the answer: the lock ends with that process
    NAME.cancel   somebody wants no more of it, and the router that computes it looks here

A file is there until its answer is kept. One that nobody has locked is taken by the next router that looks. As long as
it is there, the folders beside this one keep what they have under its name: the state, and the events.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..kept.files import TASKS, is_there, make_folder, open_locked

_CANCEL = ".cancel"
_NEW = ".new-"


class Task(msgspec.Struct, frozen=True, array_like=True):
    """One request, as another router needs it to go on."""

    response_id: str
    tenant: bytes
    body: bytes  # JSON
    headers: tuple[tuple[bytes, bytes], ...]  # those that say how urgent it is


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Task).decode


@dataclass(slots=True, frozen=True)
class HeldTask:
    """A task that this router has locked, until it releases or ends it, once."""

    name: str
    task: Task
    fd: int

    def release(self) -> None:
        """Leave it to whoever looks next."""
        os.close(self.fd)


class TaskFolder:
    """`TaskFolder` is one router's view of it. Methods may be called from any thread."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a folder that cannot be made."""
        self._path = path
        make_folder(path)

    def create(self, name: str, task: Task) -> HeldTask:
        """Write a task and hold it. Raises OSError."""
        new = self._path / f"{name}{_NEW}{os.getpid()}"
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with open(fd, "wb", closefd=False) as file:
                file.write(_encode(task))
            new.replace(self._path / name)
        except BaseException:
            os.close(fd)
            new.unlink(missing_ok=True)
            raise
        return HeldTask(name, task, fd)

    def take(self, name: str) -> HeldTask | None:
        """Hold a task that nobody holds; None: somebody does, or it has ended."""
        path = self._path / name
        try:
            fd = open_locked(path)
            return None if fd is None else self._held(name, path, fd)
        except FileNotFoundError:
            return None

    def _held(self, name: str, path: Path, fd: int) -> HeldTask:
        """Read a task that is locked. Raises FileNotFoundError where there is none any more, OSError."""
        try:
            path.stat()  # it may have ended before it was locked
            return HeldTask(name, _decode(os.pread(fd, os.fstat(fd).st_size, 0)), fd)
        except BaseException as error:
            os.close(fd)
            if not isinstance(error, msgspec.MsgspecError):
                raise
            path.unlink(missing_ok=True)  # as a machine's crash may leave it: who asks for its response finds it failed
            raise FileNotFoundError(name) from None

    def look(self, known: Collection[str], at_most: int) -> tuple[set[str], list[HeldTask]]:
        """Return those that somebody wants no more of, and hold some that nobody holds."""
        return self.cancelled(), self.take_free(known, at_most)

    def take_free(self, known: Collection[str], at_most: int) -> list[HeldTask]:
        """Hold some that nobody holds, but for `known` ones."""
        names = [name for name in os.listdir(self._path) if "." not in name and name not in known]
        found: list[HeldTask] = []
        for name in names:
            if len(found) >= at_most:
                break
            with contextlib.suppress(OSError):  # as where too many files are open: it is there at the next look
                if (task := self.take(name)) is not None:
                    found.append(task)
        return found

    def end(self, task: HeldTask) -> None:
        """Delete a task whose answer is kept, or which nobody wants."""
        with contextlib.suppress(OSError):
            (self._path / task.name).unlink(missing_ok=True)
            (self._path / f"{task.name}{_CANCEL}").unlink(missing_ok=True)
        task.release()

    def ask_to_cancel(self, name: str) -> None:
        """Tell whoever computes it. Raises OSError."""
        (self._path / f"{name}{_CANCEL}").touch(mode=0o600)

    def has(self, name: str) -> bool:
        """Tell whether a task has not ended. Raises OSError where nobody can say: it is not taken for lost."""
        return is_there(self._path / name)

    def cancelled(self) -> set[str]:
        """Return the tasks that somebody wants no more of."""
        found = {name.removesuffix(_CANCEL) for name in os.listdir(self._path) if name.endswith(_CANCEL)}
        for name in {name for name in found if not self.has(name)}:  # it ended while it was asked for
            (self._path / f"{name}{_CANCEL}").unlink(missing_ok=True)
            found.discard(name)
        return found


def unlink_unless_under_way(path: Path) -> bool:
    """Delete a response's file in a folder beside the tasks, unless it is still computed. Returns whether it is gone.

    What is under way is older than the answers that others are given meanwhile, and as needed as it was.
    """
    if (path.parent.parent / TASKS / path.name).exists():
        return False
    path.unlink(missing_ok=True)
    return True
