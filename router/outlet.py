"""The ends of the connections at which answers leave: written together, at the end of the event loop's turn.

    a step's tokens ─> each stream's events ─> Outlet.write: kept ─┐
                                               ... of every stream ┴─> Turn: one write after the other

What one connection gets in a turn goes out in one write, and the writes of many follow each other closely: a reader
on the same machine is woken once for all of them, not once for each. Nothing waits longer than the turn.
"""

from __future__ import annotations

import asyncio

_HELD_BYTES = 64 * 2**10  # more is written at once, so that the transport can say that it is full


class Turn:
    """Of one server. Knows which of its connections have something to write."""

    def __init__(self) -> None:
        self._outlets: list[Outlet] = []

    def add(self, outlet: Outlet) -> None:
        if not self._outlets:
            asyncio.get_running_loop().call_soon(self._end)
        self._outlets.append(outlet)

    def _end(self) -> None:
        outlets, self._outlets = self._outlets, []
        for outlet in outlets:
            outlet.flush()


class Outlet:
    """One connection's. `flush` comes before anything is written by another way, and before the end."""

    __slots__ = ("_parts", "_size", "_transport", "_turn")

    def __init__(self, transport: asyncio.Transport, turn: Turn) -> None:
        self._transport = transport
        self._turn = turn
        self._parts: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._turn.add(self)
        self._parts.append(data)
        self._size += len(data)
        if self._size > _HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self._parts:
            return
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        if not self._transport.is_closing():
            self._transport.write(data)
