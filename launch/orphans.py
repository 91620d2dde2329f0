"""A container's first process is the parent of all orphans in it, and takes their ends: else they stay as zombies.

    a router is killed ─> what it had started ends ─> a zombie at one look, and still at the next ─> taken

What the launcher has started itself is taken within moments by who waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

_LOOK_EVERY_S = 1.0


class Orphans:
    """Takes the ends of children that nobody waits for, one at a look at most."""

    def __init__(self) -> None:
        self._seen: int | None = None  # ended at the last look

    def look(self) -> None:
        """Take the end of the child that had ended at the last look, if it is there yet."""
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # there are no children
            ended = None
        pid = ended.si_pid if ended is not None else None
        if pid is not None and pid == self._seen:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
            pid = None
        self._seen = pid


@contextlib.asynccontextmanager
async def taking_orphans() -> AsyncIterator[None]:
    """Take the ends of orphans while the block runs, where they are this process's."""
    if os.getpid() != 1:
        yield
        return
    looking = asyncio.create_task(_look())
    try:
        yield
    finally:
        looking.cancel()


async def _look() -> None:
    orphans = Orphans()
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        orphans.look()
