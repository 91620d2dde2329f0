"""Pieces as server-sent events: the same bytes, whether a chunk was built or only its text put in."""

from __future__ import annotations

import json

import msgspec
import pytest

from kvferry.router.api.choice import TextPiece
from kvferry.router.api.events import EventWriter
from kvferry.router.api.openai_types import Completion, CompletionChoice, Struct


class Form:
    """Counts what it is asked for."""

    def __init__(self, *, has_plain_chunks: bool) -> None:
        self.has_plain_chunks = has_plain_chunks
        self.num_asked = 0

    def chunks(self, index: int, piece: TextPiece, *, is_first: bool) -> list[Struct]:
        self.num_asked += 1
        choice = CompletionChoice(index=index, text=piece.text, finish_reason=piece.finish)
        chunk = Completion(id="cmpl-1", created=1, model='a "model"', system_fingerprint="f", choices=[choice])
        return [chunk] if piece.text or piece.finish is not None else []

    def usage_chunk(self) -> Struct:
        raise NotImplementedError

    def keep(self) -> None:
        pass

    def whole(self, pieces: object) -> Struct:
        raise NotImplementedError


TEXTS = ["Hello", "", ' "quoted" \\ and \n new', "\u00e4\u20ac\U0001f600", "\0", "\0text\0", "</s>"]


def written(*, has_plain_chunks: bool) -> tuple[bytes, int]:
    form = Form(has_plain_chunks=has_plain_chunks)
    writer = EventWriter(form)
    steps = [[(index, TextPiece(text)) for index in (0, 1)] for text in TEXTS if text]
    data = b"".join([writer.events(pieces) for pieces in steps])
    return data + writer.events([(0, TextPiece("end", "stop")), (1, TextPiece("", "length"))]), form.num_asked


def test_chunks_that_differ_in_their_text_alone_are_the_same_bytes_as_built_ones() -> None:
    quick, num_quick = written(has_plain_chunks=True)
    slow, num_slow = written(has_plain_chunks=False)
    assert quick == slow
    assert num_quick < num_slow
    events = [json.loads(event[6:]) for event in quick.split(b"\n\n") if event]
    assert [event["choices"][0]["text"] for event in events if event["choices"][0]["index"] == 0] == [
        *(text for text in TEXTS if text),
        "end",
    ]


@pytest.mark.parametrize("has_plain_chunks", [False, True])
def test_a_first_piece_without_text_writes_nothing(has_plain_chunks: bool) -> None:
    assert EventWriter(Form(has_plain_chunks=has_plain_chunks)).events([(0, TextPiece(""))]) == b""


def test_every_event_is_one_json_object() -> None:
    data, _ = written(has_plain_chunks=True)
    for event in data.split(b"\n\n"):
        if event:
            assert event.startswith(b"data: ")
            msgspec.json.decode(event[6:], type=Completion)
