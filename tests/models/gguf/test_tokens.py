"""Tokens of which a file does not tell everything, or tells it twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import pytest

from kvferry.grammar.matching import Vocabulary
from kvferry.models.gguf.config import gguf_generation_config
from kvferry.models.gguf.fields import GgufFields
from kvferry.models.gguf.spellings import spellings
from kvferry.models.gguf.tokenizer import write_gguf_tokenizer
from kvferry.models.token_bytes import _BYTE_ALPHABET
from kvferry.models.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIAL = ["<unk>", "<s>", "</s>"]
# As a trainer writes them: first what it joined, the best first, then letters. `bc` is better than `ab`.
PIECES = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "bc", "ab", "\u2581a", *"\u2581abc"]
BYTES = [*SPECIAL, "ab", *_BYTE_ALPHABET]


def _write(
    path: Path,
    model: str,
    tokens: Sequence[str],
    types: Sequence[int] | None = None,
    scores: Sequence[float] | None = None,
    *,
    architecture: str = "llama",
) -> Tokenizer:
    writer = gguf.GGUFWriter(path / "m.gguf", architecture)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    if types is not None:
        writer.add_token_types(types)
    if scores is not None:
        writer.add_token_scores(scores)
    if model == "gpt2":
        writer.add_tokenizer_pre("smollm")
        writer.add_token_merges(["a b"])
    else:
        writer.add_add_space_prefix(False)
    for index, name in enumerate(("unknown", "bos", "eos")):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    write_gguf_tokenizer(path / "tokenizer.json", GgufFields(gguf.GGUFReader(path / "m.gguf")))
    return Tokenizer.from_dir(path)


def _types(tokens: Sequence[str]) -> list[int]:
    return [UNKNOWN, CONTROL, CONTROL, *(BYTE if token.startswith("<0x") else NORMAL for token in tokens[3:])]


def _scores(tokens: Sequence[str]) -> list[float]:
    return [-float(index) for index in range(len(tokens))]


@pytest.mark.parametrize(("model", "tokens"), [("gpt2", BYTES), ("llama", PIECES)])
def test_without_types_tokens_are_normal_but_for_those_that_the_file_names(
    tmp_path: Path, model: str, tokens: list[str]
) -> None:
    tokenizer = _write(tmp_path, model, tokens, scores=_scores(tokens))
    ids = tokenizer.encode("ab</s>é", add_special_tokens=False)
    assert ids[:2] == [tokens.index("ab"), 2] and tokenizer.decode(ids) == "abé"
    assert tokenizer.special_ids == {0, 1, 2}


def test_without_scores_pieces_are_joined_in_their_order(tmp_path: Path) -> None:
    tokenizer = _write(tmp_path, "llama", PIECES, _types(PIECES))
    ids = tokenizer.encode("abc", add_special_tokens=False)
    assert ids == [PIECES.index("a"), PIECES.index("bc")]


@pytest.mark.parametrize(("model", "tokens"), [("gpt2", BYTES), ("llama", PIECES)])
def test_a_list_shorter_than_its_tokens_is_named(tmp_path: Path, model: str, tokens: list[str]) -> None:
    told = rf"tokenizer\.ggml\.token_type has {len(tokens) - 1} types of {len(tokens)} tokens"
    with pytest.raises(ValueError, match=told):
        _write(tmp_path, model, tokens, _types(tokens)[:-1], _scores(tokens))


def test_a_list_of_scores_shorter_than_its_tokens_is_named(tmp_path: Path) -> None:
    told = rf"tokenizer\.ggml\.scores has {len(PIECES) - 1} scores of {len(PIECES)} tokens"
    with pytest.raises(ValueError, match=told):
        _write(tmp_path, "llama", PIECES, _types(PIECES), _scores(PIECES)[:-1])


@pytest.mark.parametrize(("model", "tokens"), [("gpt2", BYTES), ("llama", PIECES)])
def test_ids_of_one_text_are_all_decoded_as_it(tmp_path: Path, model: str, tokens: list[str]) -> None:
    """As in llama.cpp's table the last one is what a text becomes."""
    tokens = [*tokens, "ab", "ab", "", ""]
    first, last = tokens.index("ab"), len(tokens) - 3
    tokenizer = _write(tmp_path, model, tokens, _types(tokens), _scores(tokens))
    assert tokenizer.encode("ab", add_special_tokens=False) == [last]
    assert [tokenizer.decode([index]) for index in (first, last - 1, last)] == ["ab"] * 3
    assert [tokenizer.token_bytes(index) for index in (first, last - 1, last)] == [b"ab"] * 3
    assert tokenizer.decode([last + 1, last, last + 2, first]) == "abab"
    marked = f"x{tokenizer.spelling(first)}"  # marks of a user's text are characters like others
    assert tokenizer.decode(tokenizer.encode(marked, add_special_tokens=False)) == marked


def test_a_byte_at_two_ids_is_that_byte_at_both(tmp_path: Path) -> None:
    tokens = [*PIECES, "<0x41>"]
    tokenizer = _write(tmp_path, "llama", tokens, [*_types(PIECES), BYTE], _scores(tokens))
    assert tokenizer.token_bytes(tokens.index("<0x41>")) == tokenizer.token_bytes(len(tokens) - 1) == b"A"


@pytest.mark.parametrize(("model", "tokens"), [("gpt2", BYTES), ("llama", PIECES)])
def test_a_special_token_keeps_its_text_before_others_and_stays_out_of_texts(
    tmp_path: Path, model: str, tokens: list[str]
) -> None:
    tokens = [*tokens, "<s>", "</s>"]
    types = [*_types(tokens)[:-2], CONTROL, CONTROL]
    tokenizer = _write(tmp_path, model, tokens, types, _scores(tokens))
    assert tokenizer.encode("<s></s>", add_special_tokens=False) == [1, 2]
    assert tokenizer.decode([1, 2, len(tokens) - 2, len(tokens) - 1]) == ""
    assert tokenizer.decode([len(tokens) - 1], skip_special_tokens=False) == "</s>"


def test_an_id_that_is_found_as_a_whole_keeps_its_text_before_an_ordinary_one(tmp_path: Path) -> None:
    tokens = [*BYTES, "<|im_end|>", "<tool>", "<|im_end|>", "<tool>"]
    types = [*_types(BYTES), CONTROL, USER_DEFINED, NORMAL, NORMAL]
    tokenizer = _write(tmp_path, "gpt2", tokens, types)
    ids = [len(BYTES), len(BYTES) + 1]
    assert tokenizer.encode("<|im_end|><tool>", add_special_tokens=False) == ids
    fields = GgufFields(gguf.GGUFReader(tmp_path / "m.gguf"))
    assert gguf_generation_config(fields, {"eos_token_id": 2})["eos_token_id"] == [2, ids[0], ids[0] + 2]


def test_two_hidden_tokens_behind_a_special_one_are_no_other_id_of_it(tmp_path: Path) -> None:
    """Messages may spell special tokens right behind the template's own."""
    tokens = [*BYTES, "</s>"]
    tokenizer = _write(tmp_path, "gpt2", tokens, [*_types(BYTES), CONTROL])
    special = tokenizer.special_text()
    messages, hidden = special.hide([{"content": "</s><s>"}])
    ids = special.encode(f"</s>{messages[0]['content']}", hidden, False)
    assert ids[0] == 2 and tokenizer.decode(ids) == "</s><s>"


@pytest.mark.parametrize(
    ("model", "tokens"), [("gpt2", [*BYTES, "ab", '"']), ("llama", [*PIECES, "ab", "<0x22>"])], ids=["gpt2", "llama"]
)
def test_grammars_take_each_id_of_a_text_for_it(tmp_path: Path, model: str, tokens: list[str]) -> None:
    tokenizer = _write(tmp_path, model, tokens, _types(tokens), _scores(tokens))
    vocabulary = Vocabulary.from_dir(tmp_path, vocab_size=len(tokens), eos_token_ids=frozenset({2}))
    for first, last in ((tokens.index(text), len(tokens) - at) for text, at in ((tokens[-2], 2), (tokens[-1], 1))):
        assert first != last and tokenizer.token_bytes(first) == tokenizer.token_bytes(last)
        for index in (first, last):
            assert vocabulary.tokenizer.decode_bytes([index]) == tokenizer.token_bytes(index)


def test_an_unused_id_takes_no_text_from_another(tmp_path: Path) -> None:
    tokens = [*PIECES, "ab"]
    tokenizer = _write(tmp_path, "llama", tokens, [*_types(PIECES), UNUSED], _scores(tokens))
    assert tokenizer.encode("ab", add_special_tokens=False) == [tokens.index("ab")]
    assert tokenizer.decode([len(tokens) - 1]) == "ab"


def test_marks_are_characters_of_no_token() -> None:
    assert spellings(["a", "b"], ()) == (["a", "b"], [])
    tokens, marks = spellings(["a", "a\U000f0000", "a", "a", "a"], ())
    assert "\U000f0000" not in marks and len(set(marks)) == 2
    assert len(set(tokens)) == 5 and tokens[1] == "a\U000f0000" and tokens[4] == "a"
    assert {token.replace(marks[0], "").replace(marks[1], "") for token in tokens} == {"a", "a\U000f0000"}


def test_as_many_alike_as_there_are_tokens_grow_little() -> None:
    tokens, _ = spellings(["a"] * 5000, ())
    assert len(set(tokens)) == 5000 and max(map(len, tokens)) < 20
