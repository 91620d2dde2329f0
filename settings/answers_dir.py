"""The folder in which the routers of one launcher keep answers for clients that come back, where none is given.

It is the launcher's: made at its start, gone at its end. One that was killed leaves its folder behind; the next
launcher of the same user deletes it, as nobody holds its lock any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

_PREFIX = "kvferry-answers-"
_NEW_S = 60.0  # somebody may be about to lock it


class OwnAnswersDir:
    """`OwnAnswersDir` holds the folder's lock while it is open."""

    def __init__(self) -> None:
        """Raises OSError where no folder can be made."""
        _sweep()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)


def _sweep() -> None:
    """Delete what launchers of this user left that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, somebody's who runs, or just deleted by another launcher
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                stat = os.fstat(fd)
                if stat.st_uid == os.getuid() and time.time() - stat.st_mtime > _NEW_S:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
            finally:
                os.close(fd)
