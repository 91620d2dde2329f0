"""SentencePiece's tokenizers in GGUF files: the tokens of transformers' conversion, and texts that stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

from kvferry.common.errors import ConfigError
from kvferry.models.gguf.fields import GgufFields
from kvferry.models.gguf.tokenizer import write_gguf_tokenizer
from kvferry.models.tokenizer import Detokenizer, Tokenizer

SPACE = "\u2581"
CORPUS = (
    "The router places each request; a prefill worker computes the prompt and a decode worker streams the answer. "
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Привет, мир! 東京は今日も雨。 0123456789\n\n"
    "def main(argv):\n    return [x**2 for x in range(10)]  # ten  squares\n"
)
TEXTS = [
    CORPUS,
    *("", " ", "   ", "a", " a", "a ", "  two  spaces  ", "\n", "\n\n\n", "\t tab", "trailing  \n  leading"),
    *(
        "don't they're",
        "3.14159 and 10,000",
        "naïve café — e\u0301",
        "日本語 한국어 العربية עברית",
        "🦙🦙 👩‍👩‍👧",
        "\u200b\ufeff",
    ),
    *("<s>[INST] hi [/INST]", "<think>so</think>", "a <unk> b", "<0x41>", " " * 40, "▁▁", "x" * 50),
]
# Of each architecture whose spaces differ, with the types that its files have.
KINDS = ("llama", "gemma3", "phi3", "gemma4")


def _pieces(kind: str) -> tuple[list[str], list[float], list[int]]:
    """Return pieces, scores and types, of merges that a trainer finds: the sooner, the better the score."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE)
    tokenizer.train_from_iterator([CORPUS * 3], trainer)
    learned = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merged = [piece for piece in learned if len(piece) > 1]
    letters = [piece for piece in learned if len(piece) == 1 and piece != "\n"]
    head = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<think>", 4)] + [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    if kind == "gemma3":  # spaces stand as spaces, and are user-defined; so are runs of line feeds
        head += [("\n" * count, 4) for count in range(1, 5)] + [(" " * count, 4) for count in range(2, 9)]
        merged = [piece for piece in merged if piece.strip(SPACE) and piece.strip("\n")]
    head += [("<unused0>", 5)]
    tokens = [token for token, _ in head] + merged + letters
    scores = [0.0] * len(head) + [-float(rank) for rank in range(len(merged) + len(letters))]
    return tokens, scores, [kind for _, kind in head] + [1] * (len(merged) + len(letters))


def _merges(tokens: list[str]) -> list[str]:
    """Return a pair for each piece that two before it make, the one with the longest beginning."""
    places = {token: place for place, token in enumerate(tokens)}
    found = []
    for token in tokens:
        cuts = [(token[:at], token[at:]) for at in range(len(token) - 1, 0, -1)]
        pairs = [pair for pair in cuts if all(part in places for part in pair)]
        if pairs and token[0] != "<":
            found.append(" ".join(pairs[0]))
    return found


def _write(path: Path, kind: str, **flags: bool) -> Path:
    tokens, scores, types = _pieces(kind)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_tokenizer_model("gemma4" if kind == "gemma4" else "llama")
    if kind == "gemma4":
        writer.add_token_merges(_merges(tokens))
        writer.add_add_space_prefix(False)
        writer.add_add_bos_token(True)
    else:
        writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    for name, index in (("unk", 0), ("bos", 1), ("eos", 2)):
        getattr(writer, f"add_{name}_token_id")(index)
    for name, value in flags.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _convert(path: Path, folder: Path) -> Tokenizer:
    folder.mkdir()
    write_gguf_tokenizer(folder / "tokenizer.json", GgufFields(gguf.GGUFReader(path)))
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Ours and transformers', of one file."""
    root = tmp_path_factory.mktemp("files")
    found = {}
    for kind in KINDS:
        path = _write(root / f"{kind}.gguf", kind)
        architecture, tokenizer, _ = get_gguf_tokenizer(str(path))
        convert: Any = convert_gguf_tokenizer
        found[kind] = _convert(path, root / kind), convert(architecture, tokenizer)[0]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_transformers(pairs: dict[str, tuple[Tokenizer, Any]], kind: str, text: str) -> None:
    ours, theirs = pairs[kind]
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False).ids


@given(text=st.text(max_size=60))
def test_any_texts_tokens_are_those_of_transformers(pairs: dict[str, tuple[Tokenizer, Any]], text: str) -> None:
    for ours, theirs in pairs.values():
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_texts_stream_token_by_token(pairs: dict[str, tuple[Tokenizer, Any]], kind: str) -> None:
    ours, theirs = pairs[kind]
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        detokenizer = Detokenizer(ours, skip_special_tokens=False)
        parts = [detokenizer.push([token_id]) for token_id in ids] + [detokenizer.flush()]
        assert "".join(parts) == theirs.decode(ids, skip_special_tokens=False)
        assert not any("\ufffd" in part for part in parts)
    ids = ours.encode(CORPUS, add_special_tokens=False)
    assert ours.decode(ids) == CORPUS and len(ids) < len(CORPUS) / 2


def test_a_text_begins_with_the_files_token_unless_it_says_otherwise(tmp_path: Path) -> None:
    for name, flags, first in (("a", {}, 1), ("b", {"add_bos_token": False}, None)):
        tokenizer = _convert(_write(tmp_path / f"{name}.gguf", "llama", **flags), tmp_path / name)
        ids = tokenizer.encode("The worker")
        assert (ids[0] == 1) == (first == 1)


def test_a_text_of_gemma_4_begins_as_in_its_own_tokenizer(tmp_path: Path) -> None:
    """Its files say that it begins with a token, which its chat template writes itself."""
    assert _convert(_write(tmp_path / "m.gguf", "gemma4"), tmp_path / "m").encode("The worker")[0] != 1


def test_no_space_is_put_before_a_text_where_the_file_says_so(tmp_path: Path) -> None:
    with_space = _convert(_write(tmp_path / "a.gguf", "llama"), tmp_path / "a")
    without = _convert(_write(tmp_path / "b.gguf", "llama", add_space_prefix=False), tmp_path / "b")
    ids = without.encode("worker", add_special_tokens=False)
    assert ids != with_space.encode("worker", add_special_tokens=False)
    assert without.decode(ids) == "worker" and without.decode(without.encode(" worker")) == " worker"


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("t5", r"of the kind t5 \(SentencePiece's unigrams\); kvferry converts gpt2 \(byte.*the nearest is llama"),
        ("bert", r"of the kind bert \(WordPiece\); kvferry converts gpt2 \(byte-level BPE\), llama "),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, model: str, named: str) -> None:
    path = _write(tmp_path / "m.gguf", "llama")
    data = path.read_bytes()
    key = b"tokenizer.ggml.model"
    at = data.index(key) + len(key) + 4
    old = len(b"llama").to_bytes(8, "little") + b"llama"
    assert data[at : at + len(old)] == old
    path.write_bytes(data[:at] + len(model).to_bytes(8, "little") + model.encode() + data[at + len(old) :])
    with pytest.raises(ConfigError, match=named):
        write_gguf_tokenizer(tmp_path / "tokenizer.json", GgufFields(gguf.GGUFReader(path)))
