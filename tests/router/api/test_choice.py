"""A choice's tokens on their way to text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.request import SampledToken
from kvferry.models.tokenizer import Detokenizer
from kvferry.router.api.choice import ChoiceText, TextOptions, TextPiece
from kvferry.router.turns.definitions import parse_tool_use
from kvferry.router.turns.dialect import Dialect

from ..fakes import EOS, ids_of, toy_tokenizer


def _choice(**options: object) -> ChoiceText:
    merged: dict[str, object] = {"max_tokens": 100, **options}
    return ChoiceText(Detokenizer(toy_tokenizer()), TextOptions(**merged))  # type: ignore[arg-type]


class WordDetokenizer:
    """Each id is a word of `words`."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words

    def push(self, ids: Iterable[int]) -> str:
        return "".join(self._words[token_id] for token_id in ids)

    def flush(self) -> str:
        return ""


def _tokens(text: str) -> tuple[SampledToken, ...]:
    return tuple(map(SampledToken, ids_of(text)))


def test_half_a_character_waits_for_its_other_half() -> None:
    choice = _choice()
    first, second = _tokens("\u00e9")
    assert choice.push((first,), None) == TextPiece("")
    assert choice.push((second,), None) == TextPiece("\u00e9")
    assert choice.num_tokens == 2


@pytest.mark.parametrize("options", [{}, {"stops": ("x",)}, {"keep_tokens": True}])
def test_half_a_character_at_which_an_answer_is_cut_is_in_no_text(options: dict[str, object]) -> None:
    """A client that sends the text back would have the model go on behind a replacement character."""
    choice = _choice(**options)
    half = _tokens("\u00e9")[0]
    assert choice.push(_tokens("a"), None).text == "a"
    piece = choice.push((half,), "length")
    assert (piece.text, piece.finish, choice.num_tokens) == ("", "length", 2)
    assert list(piece.tokens) == ([half] if "keep_tokens" in options else [])


@pytest.mark.parametrize("options", [{}, {"stops": ("x",)}])
def test_half_a_character_before_the_models_own_end_becomes_a_replacement_character(options: dict[str, object]) -> None:
    choice = _choice(**options)
    pushed = (_tokens("\u00e9")[0], SampledToken(EOS))
    assert choice.push(pushed, "stop") == TextPiece("\ufffd", finish="stop")


def test_the_end_token_is_counted_but_not_shown_even_with_special_tokens() -> None:
    choice = _choice(skip_special_tokens=False)
    assert choice.push((*_tokens("ab"), SampledToken(EOS)), "stop") == TextPiece("ab", finish="stop")
    assert choice.num_tokens == 3


def test_a_stop_token_is_named_as_the_reason() -> None:
    choice = _choice(stop_token_ids=(ord("b"),))
    assert choice.push(_tokens("ab"), "stop") == TextPiece("a", finish="stop", stop_reason=ord("b"))


def test_a_stop_token_is_shown_on_request() -> None:
    choice = _choice(stop_token_ids=(ord("b"),), include_stop=True)
    assert choice.push(_tokens("ab"), "stop") == TextPiece("ab", finish="stop", stop_reason=ord("b"))


def test_tokens_behind_a_stop_string_are_neither_shown_nor_counted() -> None:
    choice = _choice(stops=("c",))
    assert choice.push(_tokens("abcdef"), "length") == TextPiece("ab", finish="stop", stop_reason="c")
    assert choice.num_tokens == 3


def test_a_stop_string_may_straddle_updates() -> None:
    choice = _choice(stops=("lo, w",))
    assert choice.push(_tokens("Hel"), None).text == "He"
    assert choice.push(_tokens("lo"), None).text == "l"
    assert choice.push(_tokens(", wor"), None) == TextPiece("", finish="stop", stop_reason="lo, w")


def test_stop_strings_before_min_tokens_do_not_count() -> None:
    choice = _choice(stops=("ab",), min_tokens=5)
    assert choice.push(_tokens("abab"), None) == TextPiece("abab")
    assert choice.push(_tokens("xab"), None) == TextPiece("x", finish="stop", stop_reason="ab")


def test_held_text_comes_out_at_the_end() -> None:
    choice = _choice(stops=("END",))
    assert choice.push(_tokens("EN"), None) == TextPiece("")
    assert choice.push((SampledToken(EOS),), "stop") == TextPiece("EN", finish="stop")


def test_tokens_of_held_text_are_reported_with_it() -> None:
    choice = _choice(stops=("END",), keep_tokens=True)
    assert choice.push(_tokens("E"), None) == TextPiece("")
    piece = choice.push(_tokens("x"), None)
    assert (piece.text, piece.tokens, piece.offsets) == ("Ex", list(_tokens("Ex")), [0, 1])


def test_nothing_is_delivered_of_a_call_that_wants_no_tokens() -> None:
    choice = _choice(max_tokens=0)
    assert choice.push(_tokens("a"), "length") == TextPiece("", finish="length")
    assert choice.num_tokens == 0


@given(
    text=st.text("ab\u00e9\U0001f600", min_size=1, max_size=20),
    sizes=st.lists(st.integers(1, 5), max_size=20),
    stops=st.lists(st.text("ab\u00e9", min_size=1, max_size=3), max_size=2).map(tuple),
    min_tokens=st.integers(0, 10),
)
def test_the_answer_does_not_depend_on_how_tokens_arrive(
    text: str, sizes: list[int], stops: tuple[str, ...], min_tokens: int
) -> None:
    def answer(sizes: list[int], *, keep_tokens: bool) -> tuple[str, object, int]:
        choice, pieces = _choice(stops=stops, min_tokens=min_tokens, keep_tokens=keep_tokens), []
        rest = _tokens(text)
        for size in (*sizes, len(rest)):
            update, rest = rest[:size], rest[size:]
            if update and choice.finish is None:
                pieces.append(choice.push(update, None if rest else "length"))
        whole = TextPiece.joined(pieces)
        assert len(whole.tokens) == (choice.num_tokens if keep_tokens else 0)
        return whole.text, whole.stop_reason, choice.num_tokens

    expected = answer([1] * len(text.encode()), keep_tokens=True)
    assert answer(sizes, keep_tokens=True) == answer(sizes, keep_tokens=False) == expected


def test_a_stop_string_counts_that_ends_within_the_token_that_begins_a_call() -> None:
    use = parse_tool_use([{"type": "function", "function": {"name": "f"}}], None, None)
    reader = Dialect.of_template("{{ tools }}<tool_call></tool_call>", variables={"tools"}).reader(
        use, begins_inside=False
    )
    words = ["So", ".E", 'ND<tool_call>{"name', '": "f"}</tool_call>']
    options = TextOptions(stops=("END",), calls=lambda: reader, max_tokens=100)
    choice = ChoiceText(cast(Detokenizer, WordDetokenizer(words)), options)
    shown = [choice.push((SampledToken(number),), None) for number in range(3)]
    assert "".join(piece.text for piece in shown) == "So."
    assert (choice.finish, shown[-1].stop_reason, choice.num_tokens) == ("stop", "END", 3)
