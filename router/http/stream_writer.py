"""The ends of the connections at which answers leave: written together, at the end of the event loop's turn.

    a step's tokens ─> each stream's events ─> StreamWriter.write: kept ─┐
                                         ... of every stream ┴─> WriteCoalescer: one write after the other
    ... of a plain stream ─> WriteCoalescer.before_end: its events are made then, and no task is woken for them

What one connection gets in a turn goes out in one write, and the writes of many follow each other closely: a reader
on the same machine is woken once for all of them, not once for each. Nothing waits longer than the turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from .kernel import num_unsent

CHUNK_ENCODER = "kvferry.chunk_encoder"  # where the server lends its own way, in the scope

_HELD_BYTES = 64 * 2**10  # more is written at once, so that the transport can say that it is full
# A transport of TLS takes whatever it is given in one piece, and says with the next one that it is full.
_TLS_PIECE_BYTES = 64 * 2**10


class WriteCoalescer:
    """`WriteCoalescer` knows which connections of a server have something to write."""

    def __init__(self) -> None:
        self._writers: list[StreamWriter] = []
        self._calls: list[Callable[[], None]] = []
        self._is_due = False

    def add(self, writer: StreamWriter) -> None:
        self._writers.append(writer)
        self._schedule()

    def before_end(self, call: Callable[[], None]) -> None:
        """Call this before the writes of this turn. It raises nothing."""
        self._calls.append(call)
        self._schedule()

    def _schedule(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._end)

    def _end(self) -> None:
        calls, self._calls = self._calls, []
        for call in calls:
            call()
        writers, self._writers = self._writers, []
        self._is_due = False
        if self._calls:
            self._schedule()
        for writer in writers:
            writer.flush()


class StreamWriter:
    """`StreamWriter` keeps what a connection writes in a turn.

    `flush` comes before anything is written by another way, and before the end.
    """

    __slots__ = ("_by_tls", "_parts", "_size", "_transport", "coalescer")

    def __init__(self, transport: asyncio.Transport, coalescer: WriteCoalescer) -> None:
        self._transport = transport
        self._by_tls = transport.get_extra_info("sslcontext") is not None
        if self._by_tls:
            transport.set_write_buffer_limits(_HELD_BYTES)  # as others have them
        self.coalescer = coalescer
        self._parts: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        if not self._parts:
            self.coalescer.add(self)
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
        if self._transport.is_closing():
            return
        if self._by_tls and len(data) > _TLS_PIECE_BYTES:
            whole = memoryview(data)
            for start in range(0, len(data), _TLS_PIECE_BYTES):
                self._transport.write(whole[start : start + _TLS_PIECE_BYTES])
        else:
            self._transport.write(data)

    def has_unsent(self) -> bool:
        """Tell whether the client's machine lacks a part of what was written."""
        return bool(self._parts or self._transport.get_write_buffer_size() or num_unsent(self._transport))


class Flow(Protocol):
    """A connection's flow: whether its reader is behind."""

    write_paused: bool

    async def drain(self) -> None: ...

    def resume_reading(self) -> None: ...


class ChunkEncoder:
    """`ChunkEncoder` is an answer's own way out, past all that stands between.

    It writes the parts of a body whose length was not announced, and hears that the client has left.
    """

    __slots__ = ("_flow", "_is_lost", "_on_lost", "_writer", "before_end")

    def __init__(self, writer: StreamWriter, flow: Flow) -> None:
        self._writer = writer
        self._flow = flow
        self._is_lost = False
        self._on_lost: Callable[[], None] | None = None
        self.before_end = writer.coalescer.before_end

    @property
    def is_full(self) -> bool:
        """True while what is written would pile up."""
        return self._flow.write_paused

    def write(self, part: bytes) -> None:
        self._writer.write(b"%x\r\n%b\r\n" % (len(part), part))

    async def send(self, part: bytes) -> None:
        """Write the part when there is room."""
        if self._flow.write_paused:
            await self._flow.drain()
        self.write(part)

    def watch(self, on_lost: Callable[[], None] | None) -> None:
        """Call this once the client has left, at once if it has; None: nobody waits for it any more."""
        self._on_lost = on_lost
        if on_lost is not None:
            self._flow.resume_reading()  # else its leaving is not seen
            if self._is_lost:
                on_lost()

    def lose(self) -> None:
        """The connection's: it is gone."""
        self._is_lost = True
        if self._on_lost is not None:
            self._on_lost()
