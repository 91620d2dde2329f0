"""Answers behind thoughts: the grammar holds from their end on, and a budget ends them, whatever is taken back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.grammar import Grammar, GrammarBroken, Thoughts
from kvferry.grammar.matching import Vocabulary, compile_grammar, find_first_mask
from kvferry.grammar.thinking import FirstMatcher
from kvferry.models.tokenizer import Tokenizer
from kvferry.router.turns.dialect import Dialect
from kvferry.router.turns.lazy import Thinking, thinking
from kvferry.tests.checkpoints import write_tokenizer
from kvferry.tests.matchers import may_end

EOS = 1
MARKS = ("<think>", "</think>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>")
ANSWERS: list[tuple[Grammar, list[str], list[str]]] = [
    (Grammar("json_object", b""), ['{"a": 1}'], ["a", "[1]"]),
    (Grammar("json_schema", b'{"enum": ["x", "y"]}'), ['"x"'], ['"z"']),
    (Grammar("regex", b"[a-c]+/\\d"), ["abc/1"], ["abc"]),
    (Grammar("choice", b'["yes", "no"]'), ["no"], ["maybe"]),
    (Grammar("lark", b'start: NUM ("+" NUM)*\nNUM: /[0-9]+/'), ["1+22"], ["+1"]),
    (Grammar("lark", b'root ::= [a-z]+ "!"'), ["hi!"], ["hi"]),
]


class Words:
    """A vocabulary in which `<think>` and `</think>` are tokens, special or not, or several."""

    def __init__(self, path: Path, marks: str) -> None:
        write_tokenizer(path, 512)
        file = path / "tokenizer.json"
        told: dict[str, Any] = json.loads(file.read_text())
        if marks != "texts":
            at = len(told["model"]["vocab"])
            told["added_tokens"] += [
                {"id": at + number, "content": mark, "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": marks == "special"}
                for number, mark in enumerate(MARKS)
            ]  # fmt: skip
        file.write_text(json.dumps(told))
        self.tokenizer = Tokenizer.from_dir(path)
        self.vocabulary = Vocabulary.from_dir(
            path, vocab_size=self.tokenizer.vocab_size, eos_token_ids=frozenset({EOS})
        )

    def thinking(self, prompt: str = "<user>hi", **dialect: Any) -> Thinking:
        tokenizer, of = self.tokenizer, Dialect(reasoning_parser="think", **dialect)
        found = thinking(of, prompt, "", tokenizer.mark_id, tokenizer.added_id)
        assert found is not None
        return found

    def takes(self, matcher: FirstMatcher, text: str) -> bool:
        """Tell whether an answer may be this, each token being among those that the masks let come."""
        for token_id in self.tokenizer.encode(text, add_special_tokens=False):
            mask = matcher.mask()
            if not mask[token_id >> 3] >> (token_id & 7) & 1:
                return False
            matcher.accept([token_id])
        return may_end(matcher)


@pytest.fixture(scope="module", params=["special", "words", "texts"])
def words(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Words:
    return Words(tmp_path_factory.mktemp("tokenizer"), request.param)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Words:
    return Words(tmp_path_factory.mktemp("tokenizer"), "words")


def compiled(words: Words, grammar: Grammar, way: Thinking, budget: int | None = None) -> FirstMatcher:
    return compile_grammar(words.vocabulary, Grammar(grammar.kind, grammar.text, way.before(budget)))


@pytest.mark.parametrize(("grammar", "good", "bad"), ANSWERS)
def test_an_answer_follows_its_grammar_behind_thoughts(
    words: Words, grammar: Grammar, good: list[str], bad: list[str]
) -> None:
    first = compiled(words, grammar, words.thinking())
    inside = compiled(words, grammar, words.thinking("<user>hi<assistant><think>\n"))
    for text in good:
        assert words.takes(first.fork(), text), "without thoughts"
        for thoughts in ("", "Hm: {1}!", "\n\nI think that\n"):
            for blank in ("", "\n\n"):
                assert words.takes(first.fork(), f"<think>{thoughts}</think>{blank}{text}")
                assert words.takes(inside.fork(), f"{thoughts}</think>{blank}{text}")
        assert not words.takes(first.fork(), f"Hm: {text}")
        assert not words.takes(inside.fork(), text) and not words.takes(inside.fork(), f"Hm: {text}")
    for text in bad:
        assert not words.takes(first.fork(), text) and not words.takes(first.fork(), f"<think>Hm</think>{text}")
        assert not words.takes(inside.fork(), f"Hm</think>{text}")


def test_first_tokens_are_those_of_the_parts(words: Words) -> None:
    """So that a grammar that was checked is not compiled again behind thoughts."""
    for prompt in ("<user>hi", "<user>hi<think>"):
        for grammar, _, _ in ANSWERS:
            for budget in (None, 0, 3):
                way = words.thinking(prompt)
                if budget is not None and not (way.takes_budget and (budget or not way.may_be_left_out)):
                    continue
                whole = compiled(words, grammar, way, budget).mask()
                parts = find_first_mask(words.vocabulary, way.first(budget))
                if way.may_be_left_out:
                    alone = find_first_mask(words.vocabulary, grammar)
                    parts = bytes(one | other for one, other in zip(parts, alone, strict=True))
                assert parts == whole


def test_a_budget_needs_marks_that_are_tokens(words: Words) -> None:
    has_tokens = words.tokenizer.added_id("<think>") is not None
    assert words.thinking().takes_budget == words.thinking("<think>").takes_budget == has_tokens


@pytest.mark.parametrize("prompt", ["<user>hi", "<user>hi<think>\n"])
@pytest.mark.parametrize("is_alone", [True, False], ids=["any text", "a grammar"])
def test_thoughts_end_at_their_budget(marked: Words, prompt: str, is_alone: bool) -> None:
    way = marked.thinking(prompt)
    end = marked.tokenizer.added_id("</think>")
    for budget in (1, 4):
        if is_alone:
            matcher = compile_grammar(marked.vocabulary, way.alone(budget))
        else:
            matcher = compiled(marked, Grammar("json_object", b""), way, budget)
        if way.begin:
            matcher.accept(marked.tokenizer.encode("<think>", add_special_tokens=False))
        thoughts = marked.tokenizer.encode("abcdefgh", add_special_tokens=False)[:budget]
        for token_id in thoughts:
            assert matcher.forced() is None and matcher.mask() != _only(end, matcher)
            matcher.accept([token_id])
        assert matcher.forced() == end and matcher.mask() == _only(end, matcher)
        assert end is not None
        matcher.accept([end])
        assert marked.takes(matcher, '{"a": 1}')


def _only(token_id: int | None, matcher: FirstMatcher) -> bytes:
    assert token_id is not None
    return (1 << token_id).to_bytes(len(matcher.mask()), "little")


def test_an_answer_without_thoughts_has_no_budget(marked: Words) -> None:
    way = marked.thinking()
    any_text = compile_grammar(marked.vocabulary, way.alone(2))
    assert marked.takes(any_text.fork(), "Many words and a <think> among them, and no end")
    assert marked.takes(any_text.fork(), "<think>a</think>Many words")
    assert not marked.takes(any_text.fork(), "<think>Many words")


@given(
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12),
    budget=st.integers(0, 6),
    is_inside=st.booleans(),
    ends_at=st.integers(0, 20),
)
def test_where_an_answer_stands_follows_from_its_tokens_alone(
    marked: Words, steps: list[tuple[int, int]], budget: int, is_inside: bool, ends_at: int
) -> None:
    """Whatever drafts were taken and taken back on the way."""
    tokenizer, way = marked.tokenizer, marked.thinking("<think>" if is_inside else "hi")
    first = compiled(marked, Grammar("json_object", b""), way, budget)
    begin = [] if is_inside else tokenizer.encode("<think>", add_special_tokens=False)
    tokens = begin + tokenizer.encode("abcdefghij" * 3, add_special_tokens=False)
    tokens[min(len(begin) + ends_at, len(begin) + budget)] = tokenizer.added_id("</think>") or 0
    matcher, taken = first.fork(), 0
    for more, back in steps:
        try:
            fresh = first.fork()
            fresh.accept(tokens[: taken + more])
        except GrammarBroken:
            break
        matcher.accept(tokens[taken : taken + more])
        taken += more
        matcher.mask()
        back = min(back, taken)
        matcher.rollback(back)
        taken -= back
        fresh = first.fork()
        fresh.accept(tokens[:taken])
        assert matcher.mask() == fresh.mask() and matcher.forced() == fresh.forced()


def test_other_words_for_a_schema_keep_the_thoughts(marked: Words) -> None:
    """A keyword that the library does not know is said in others."""
    grammar = Grammar("json_schema", b'{"type": "integer", "not": {"minimum": 3}}')
    first = compiled(marked, grammar, marked.thinking())
    assert marked.takes(first.fork(), "<think>Hm</think>2") and not marked.takes(first.fork(), "<think>Hm</think>4")


@pytest.mark.parametrize(
    ("dialect", "prompt", "continued", "is_there"),
    [
        (Dialect(), "hi", "", False),
        (Dialect(reasoning_parser="think"), "hi", "", True),
        (Dialect(reasoning_parser="think"), "hi<think>\n\n</think>\n\n", "", False),
        (Dialect(reasoning_parser="think"), "hi", "It is", False),
        (Dialect(reasoning_parser="think"), "hi", "<think>It is", True),
        (Dialect(reasoning_parser="deepseek_r1"), "hi", "", True),
        (Dialect(reasoning_parser="channels"), "hi", "", False),  # whose marks this vocabulary has not
        (Dialect(reasoning_parser="channels"), "hi", "It is", False),
    ],
)
def test_who_has_thought_already_does_not(dialect: Dialect, prompt: str, continued: str, is_there: bool) -> None:
    found = thinking(dialect, prompt, continued, lambda text: None, lambda text: None)
    assert (found is not None) == is_there
    if found is not None:
        assert isinstance(found.before(None), Thoughts)


def test_an_answer_in_channels_follows_its_grammar_in_the_last(marked: Words) -> None:
    tokenizer = marked.tokenizer
    dialect = Dialect(reasoning_parser="channels")
    assert thinking(dialect, "hi", "It is", tokenizer.mark_id, tokenizer.added_id) is None
    way = thinking(dialect, "hi", "", tokenizer.mark_id, tokenizer.added_id)
    assert way is not None and not way.takes_budget and not way.may_be_left_out
    first = compiled(marked, Grammar("json_object", b""), way)
    thought, final = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant", "<|channel|>final<|message|>"
    assert marked.takes(first.fork(), f'{final}{{"a": 1}}')
    assert not marked.takes(first.fork(), '{"a": 1}') and not marked.takes(first.fork(), f"{final}Hm")
    assert marked.takes(first.fork(), f'{thought}{final}{{"a": 1}}')
    assert find_first_mask(marked.vocabulary, way.first(None)) == first.mask()
