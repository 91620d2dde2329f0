"""Answers of named tokens alone."""

from __future__ import annotations

import pytest

from kvferry.common.errors import RequestError
from kvferry.common.grammar import Grammar, pack_mask
from kvferry.grammar.matching import Vocabulary, compile_grammar, find_first_mask
from kvferry.grammar.tokens import ANY, TOKENS
from kvferry.tests.checkpoints import write_tokenizer
from kvferry.tests.matchers import END, may_come, may_end

SIZE = 300


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("tokens")
    write_tokenizer(path, 512)
    return Vocabulary.from_dir(path, vocab_size=SIZE, eos_token_ids=frozenset({END, 3}))


def of_tokens(*token_ids: int) -> Grammar:
    num_bytes = -(-(max(token_ids) + 1) // 32) * 4
    return Grammar(TOKENS, pack_mask(sum(1 << token_id for token_id in token_ids).to_bytes(num_bytes, "little")))


@pytest.mark.parametrize("token_ids", [{7}, {5, 6, 299}, {31, 32, 64}, {END, 9}, set(range(SIZE))])
def test_the_same_tokens_may_come_at_every_place(vocabulary: Vocabulary, token_ids: set[int]) -> None:
    first = compile_grammar(vocabulary, of_tokens(*token_ids))
    for matcher in (first, first.fork()):
        for token_id in token_ids:
            assert may_come(matcher) == token_ids and len(matcher.mask()) == vocabulary.mask_bytes
            assert may_end(matcher) == (END in token_ids), "an end is a token like others"
            matcher.accept([token_id])
        matcher.rollback(len(token_ids))
    assert find_first_mask(vocabulary, of_tokens(*token_ids)) == first.mask()


def test_one_token_is_forced_and_several_are_not(vocabulary: Vocabulary) -> None:
    assert compile_grammar(vocabulary, of_tokens(8)).forced() == 8
    assert compile_grammar(vocabulary, of_tokens(8, 9)).forced() is None


@pytest.mark.parametrize("token_ids", [(SIZE,), (2, SIZE), (2, 7, SIZE + 40, 5000)])
def test_tokens_beyond_the_vocabulary_are_refused_by_name(vocabulary: Vocabulary, token_ids: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=f"id {max(token_ids)}, which is not below the vocabulary's {SIZE}"):
        compile_grammar(vocabulary, of_tokens(*token_ids))


@pytest.mark.parametrize("text", [b"", b"5,6", pack_mask(b"\1\0\0\0")[:-1], pack_mask(b"\1"), pack_mask(b"")])
def test_what_is_no_mask_has_no_answer(vocabulary: Vocabulary, text: bytes) -> None:
    with pytest.raises(RequestError, match="no answer"):
        compile_grammar(vocabulary, Grammar(TOKENS, text))


def test_any_text_has_every_token(vocabulary: Vocabulary) -> None:
    assert may_come(compile_grammar(vocabulary, Grammar(ANY, b""))) == set(range(SIZE))
