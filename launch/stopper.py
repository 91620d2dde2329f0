"""Runs one coroutine until it ends or is stopped, and says which error it was."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from ..common.errors import KVFerryError


class Stopper:
    """Runs one coroutine until it ends or `stop` is called, and lets it clean up."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        self._stop.set()

    async def run(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            task.cancel()
            await asyncio.wait((task,))
        if not task.cancelled() and (error := task.exception()) is not None:
            raise _first_error(error)


def _first_error(error: BaseException) -> BaseException:
    """Return one error of a task group: one that kvferry raised on purpose if there is any."""
    while isinstance(error, BaseExceptionGroup):
        ours, _ = error.split(KVFerryError)
        error = (ours or error).exceptions[0]
    return error
