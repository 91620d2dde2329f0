"""Wait for a lock that somebody else may keep, for a while at most."""

from __future__ import annotations

import fcntl
from time import monotonic, sleep


def lock(fd: int, *, within_s: float, look_every_s: float) -> bool:
    """Lock a file or folder for this process, and return whether it could: others may keep it for longer than that.

    The calling thread sleeps meanwhile. Raises OSError where nothing can be locked.
    """
    until = monotonic() + within_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if monotonic() >= until:
                return False
        sleep(look_every_s)
