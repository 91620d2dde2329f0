"""Streamed arguments: every beginning of them can be parsed, and all of them have only whole characters."""

from __future__ import annotations

import json
from itertools import pairwise

import jiter
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.router.turns.call_reader import Arguments

PARTS = ["a", "😀", "u", "d83d", r"\\", r"\"", r"\n", r"\u00e9", r"\ud83d", r"\ude00", r"\uD83D", r"\ud83d\ude00"]


def _pieces(text: str, sizes: list[int]) -> list[str]:
    """What is told of a text that comes in pieces of these sizes."""
    arguments, told, at = Arguments(), [], 0
    for size in sizes:
        told.append(arguments.push(text[at : at + size]))
        at += size
    return [*told, arguments.push(text[at:]), arguments.end()]


@given(st.lists(st.sampled_from(PARTS), max_size=8), st.lists(st.integers(1, 5), max_size=40))
def test_every_beginning_is_json_and_all_of_it_has_whole_characters(parts: list[str], sizes: list[int]) -> None:
    text = '{"x": "' + "".join(parts) + '"}'
    known = ""
    for piece in _pieces(text, sizes):
        known += piece
        jiter.from_json(known.encode(), partial_mode="trailing-strings")
    written = json.dumps(json.loads(text), ensure_ascii=False)
    assert json.loads(known) == json.loads(written.encode(errors="replace"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (r'{"a": "\ud83d\ude00"}', ['{"a": "', r"\ud83d\ude00", '"}', ""]),
        (r'{"a": "\ud83dx"}', ['{"a": "', "?x", '"}', ""]),
    ],
)
def test_a_character_is_told_in_one_piece(text: str, told: list[str]) -> None:
    at = text.index("\\")
    arguments = Arguments()
    cuts = [0, at + 6, text.index('"}'), len(text)]
    pieces = [arguments.push(text[first:last]) for first, last in pairwise(cuts)]
    assert [*pieces, arguments.end()] == told


@pytest.mark.parametrize("text", [r'{"a": "\u12', r'{"a": "\ud83d\ud', '{"a": "\\', "no json \\u", r"\ux \q"])
def test_what_is_cut_or_is_no_json_is_told_to_its_end(text: str) -> None:
    assert "".join(_pieces(text, [1] * len(text))) == text.replace(r"\ud83d", "?")
