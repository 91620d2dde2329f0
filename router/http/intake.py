"""Bytes that clients have sent: parsed by turns, and counted for each message.

    received -> Intake -> a piece of this connection, a piece of the next ... until TURN_S of the loop's turn are spent
                            what is left over waits for the next turn; nothing more of that connection is read meanwhile

One read may hand over a quarter of a megabyte, and parsing it may take tens of milliseconds where it is chunks of one
byte: without turns, a few such clients would hold up every stream. What is framing rather than content (a head, the
sizes of chunks, trailers) is bounded too.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from uvicorn.protocols.http.flow_control import FlowControl

from ...common.clock import Clock, SystemClock
from ...common.errors import RequestError
from .kernel import num_unread

PIECE_BYTES = 4096  # of one connection before the next one's: half a millisecond at worst
TURN_S = 0.004
MAX_HEAD_BYTES = 64 * 2**10  # and one piece
MAX_HEADERS = 256
MAX_FRAMING_BYTES = 64 * 2**10  # beyond as many bytes as the content has; and at a stretch
_SINK_S = 0.002
_SINK_READS = 4  # of a quarter of a megabyte at most


class Reader(Protocol):
    """One connection."""

    def parse_piece(self) -> bool:
        """Parse PIECE_BYTES of what was received; whether more is left."""
        ...

    def hold(self) -> None:
        """Receive nothing more: what is left must wait."""
        ...

    def release(self) -> None:
        """All is parsed. Idempotent."""
        ...


class Intake:
    """`Intake` parses what the connections of one server received. Belongs to its loop."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._now = (clock or SystemClock()).now
        self._waiting: deque[Reader] = deque()
        self._spent_s = 0.0  # in this turn of the loop
        self._is_counting = False

    def offer(self, reader: Reader) -> None:
        """Take a reader that has received something: it is parsed at once if the turn has time left."""
        if reader not in self._waiting:
            self._waiting.append(reader)
        self._parse()

    def _parse(self) -> None:
        if not self._is_counting:
            self._is_counting = True
            asyncio.get_running_loop().call_soon(self._next_turn)
        begin_s = self._now() - self._spent_s
        while self._waiting and self._spent_s < TURN_S:
            reader = self._waiting.popleft()
            if reader.parse_piece():
                self._waiting.append(reader)
            else:
                reader.release()
            self._spent_s = self._now() - begin_s
        for reader in self._waiting:
            reader.hold()

    def _next_turn(self) -> None:
        self._spent_s, self._is_counting = 0.0, False
        if self._waiting:
            self._parse()


class HeldFlow(FlowControl):
    """uvicorn's, with a second reason not to read."""

    is_held = False

    @property
    def has_unread(self) -> bool:
        """Something has come that is not parsed: it waits for its turn, or the kernel has it."""
        return self.is_held or num_unread(self._transport) > 0

    def pause_reading(self) -> None:
        if self.is_held:
            self.read_paused = True
        else:
            super().pause_reading()

    def resume_reading(self) -> None:
        if self.is_held:
            self.read_paused = False
        else:
            super().resume_reading()

    def hold(self) -> None:
        if not self.is_held:
            if not self.read_paused and not self._transport.is_closing():
                self._transport.pause_reading()
            self.is_held = True

    def release(self) -> None:
        if self.is_held:
            self.is_held = False
            if not self.read_paused and not self._transport.is_closing():
                self._transport.resume_reading()


class Sink:
    """A sink reads what nobody wants a little at a time: half a gigabyte a second of all connections together."""

    def __init__(self) -> None:
        self._waiting: deque[HeldFlow] = deque()
        self._is_due = False

    def take(self, flow: HeldFlow) -> None:
        """So much has been read; the next comes when it is this connection's turn."""
        flow.hold()
        self._waiting.append(flow)
        self._schedule()

    def _schedule(self) -> None:
        if self._waiting and not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(_SINK_S, self._release)

    def _release(self) -> None:
        self._is_due = False
        for _ in range(min(_SINK_READS, len(self._waiting))):
            self._waiting.popleft().release()
        self._schedule()


@dataclass(slots=True)
class MessageBytes:
    """The bytes of the message that a connection is reading: head, content, and what stands between and behind."""

    is_in_head: bool = False
    _num_head: int = 0
    _num_headers: int = 0
    _num_content: int = 0
    _num_counted: int = 0  # of the content, in earlier pieces
    _num_framing: int = 0
    _num_bare: int = 0  # framing since the last content
    _is_heads: bool = False  # the piece has bytes of a head

    def add_header(self) -> None:
        self._num_headers += 1

    def add_content(self, num_bytes: int) -> None:
        self._num_content += num_bytes

    def end_head(self) -> None:
        """Raises RequestError where it was too much."""
        self.is_in_head = False
        if self._num_headers > MAX_HEADERS:
            raise _head_too_large(f"{MAX_HEADERS} fields")

    def add_piece(self, num_bytes: int) -> None:
        """So many bytes have been parsed. Raises RequestError where the message has too many."""
        if self.is_in_head:
            self._num_head += num_bytes
            if self._num_head > MAX_HEAD_BYTES:
                raise _head_too_large(f"{MAX_HEAD_BYTES} bytes")
        elif self._is_heads:
            self._is_heads = False
        else:
            self._add_framing(num_bytes - (self._num_content - self._num_counted))
        self._num_counted = self._num_content

    def _add_framing(self, num_bytes: int) -> None:
        self._num_framing += num_bytes
        self._num_bare = num_bytes + (self._num_bare if self._num_content == self._num_counted else 0)
        if self._num_bare > MAX_FRAMING_BYTES or self._num_framing > self._num_content + MAX_FRAMING_BYTES:
            raise RequestError(
                f"chunks and trailers take {self._num_framing} bytes beside {self._num_content} of content; "
                "send larger chunks",
                code="too_much_framing",
            )

    @classmethod
    def begin(cls) -> MessageBytes:
        """A message begins."""
        return cls(is_in_head=True, _is_heads=True)


def _head_too_large(limit: str) -> RequestError:
    return RequestError(f"the request's head has more than {limit}", code="request_head_too_large", status=431)
