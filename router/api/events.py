"""An answer's pieces as server-sent events.

    piece ─> form ─> chunk ─> `data: {json}` and an empty line

Events of an answer that is kept (`router/kept`) have numbers, in a line `id: N` before each: a client that comes back
says which it has, and gets those that follow.

A chunk that differs from the one before it in nothing but its text is not built again: the first of them leaves the
bytes before and after its text, and the next text goes between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from ..http.stream_writer import ChunkEncoder
from ..kept.kept_answer import KeptAnswer
from ..state.errors import HttpFailure
from .answer import FastWriter
from .choice import TextPiece
from .form import Form

DONE = b"data: [DONE]\n\n"
_MARK = "\0text\0"  # no name and no id has it

_encode = msgspec.json.Encoder().encode


def encode_events(chunks: Sequence[object]) -> bytes:
    return b"".join([b"data: " + _encode(chunk) + b"\n\n" for chunk in chunks])


def encode_error(failure: HttpFailure) -> bytes:
    return b"data: " + failure.body + b"\n\n"


def encode_typed(events: Sequence[object]) -> bytes:
    """Write events each of which has its type as a field, and as its name before it."""
    return b"".join([encode_typed_event(event) for event in events if isinstance(event, dict)])


def encode_typed_event(event: Mapping[str, object]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (str(event["type"]).encode(), _encode(event))


@dataclass(slots=True, frozen=True)
class EventFormat:
    """An endpoint's way of writing events: OpenAI's first one, unless it says otherwise."""

    encode: Callable[[Sequence[object]], bytes] = encode_events
    error: Callable[[HttpFailure], bytes] = encode_error
    end: bytes = DONE  # after the last event
    num_before: int = 0  # events of an answer that its client has from elsewhere


OPENAI_EVENTS = EventFormat()


class EventNumbers:
    """The numbers of one answer's events, from 1 on, or behind those that were told elsewhere."""

    def __init__(self, kept: KeptAnswer, num_before: int) -> None:
        self._kept = kept
        self._last = num_before

    @property
    def is_behind(self) -> bool:
        """The client has had events that were not written yet."""
        return self._last < self._kept.key.after

    def write(self, event: bytes) -> bytes:
        """Number the next event; empty where the client has it. One that could not be found again has no number."""
        self._last += 1
        if self._last <= self._kept.key.after:
            return b""
        return b"id: %d\n%b" % (self._last, event) if self._kept.is_kept else event


class EventWriter:
    """`EventWriter` writes one answer. Pieces of a choice come in order."""

    def __init__(self, form: Form, events: EventFormat = OPENAI_EVENTS, numbers: EventNumbers | None = None) -> None:
        """`numbers`: of an answer that is kept."""
        self._form = form
        self._encode_events = events.encode
        self._numbers = numbers
        self._around: dict[int, tuple[bytes, bytes]] = {}  # by choice: a plain chunk's bytes before and after its text
        self._seen: set[int] = set()

    def events(self, pieces: Sequence[tuple[int, TextPiece]]) -> bytes:
        events = [self._event(index, piece) for index, piece in pieces]
        return events[0] if len(events) == 1 else b"".join(events)

    def begins_choice(self, pieces: Sequence[tuple[int, TextPiece]]) -> bool:
        """Return whether a piece is its choice's first, with which goes what is said of the prompt."""
        return any(index not in self._seen for index, _ in pieces)

    def fast_writer(self, encoder: ChunkEncoder) -> FastWriter | None:
        """Return a writer for the middle of a lone choice, once its first piece is written; None: not mere text."""
        around = self._around.get(0)
        return None if around is None else _PlainChunkWriter(*around, encoder)

    def _event(self, index: int, piece: TextPiece) -> bytes:
        if piece.finish is None and index in self._around:
            before, after = self._around[index]
            event = before + _encode(piece.text) + after
            return event if self._numbers is None else self._numbers.write(event)
        is_first = index not in self._seen
        if is_first:
            self._seen.add(index)
            if self._form.has_plain_chunks:
                self._around[index] = self._split(index)
        chunks = self._form.chunks(index, piece, is_first=is_first)
        if self._numbers is None:
            return self._encode_events(chunks)
        return b"".join([self._numbers.write(self._encode_events([chunk])) for chunk in chunks])

    def _split(self, index: int) -> tuple[bytes, bytes]:
        event = self._encode_events(self._form.chunks(index, TextPiece(_MARK), is_first=False))
        before, _, after = event.partition(_encode(_MARK))
        return before, after


class _PlainChunkWriter:
    """A fast writer that writes each text as an event of its own."""

    __slots__ = ("_after", "_before", "_encoder", "before_end")

    def __init__(self, before: bytes, after: bytes, encoder: ChunkEncoder) -> None:
        self._before = before
        self._after = after
        self._encoder = encoder
        self.before_end = encoder.before_end

    @property
    def is_full(self) -> bool:
        return self._encoder.is_full

    def write(self, text: str) -> None:
        self._encoder.write(self._before + _encode(text) + self._after)
