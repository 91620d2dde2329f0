"""The sending of one answer, which may be cut: by a client that leaves, or by the server, which tells an error then."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from .stream_writer import ChunkEncoder


class Sending:
    """`Sending` is one answer's."""

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None  # while it sends
        self._ended_by: Exception | None = None
        self.is_cut = False

    def end(self, error: Exception) -> None:
        """End it from outside: its client is told the error."""
        self._ended_by = self._ended_by or error
        self._cut()

    def _cut(self) -> None:
        if self._task is not None and not self.is_cut:
            self._task.cancel()
        self.is_cut = True

    async def run(self, send: Callable[[], Awaitable[None]], encoder: ChunkEncoder | None) -> Exception | None:
        """Have it sent. Returns what went wrong: nothing also where it was cut because the client left.

        `encoder`: the connection's, which knows when the client leaves.
        """
        if encoder is not None:
            encoder.watch(self._cut)
        return self._ended_by if self.is_cut else await self._run(send, encoder)

    async def _run(self, send: Callable[[], Awaitable[None]], encoder: ChunkEncoder | None) -> Exception | None:
        self._task = asyncio.current_task()
        assert self._task is not None
        try:
            await send()
        except asyncio.CancelledError:
            if not self.is_cut:
                raise
            self._task.uncancel()
            return self._ended_by
        except Exception as error:
            return error
        finally:
            self._task = None
            if encoder is not None:
                encoder.watch(None)
        return None
