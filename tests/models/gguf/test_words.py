"""Byte-level BPE in GGUF files: texts are cut as transformers cuts them under the same name of rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

from kvferry.models.gguf.fields import GgufFields
from kvferry.models.gguf.tokenizer import write_gguf_tokenizer

CORPUS = (
    "It's the router's turn, isn't it? THEY'LL say: camelCaseWords and HTTPServer2 in 2024, 10,000 or 3.14159.\n\n"
    "  def main(argv):\n\treturn [x**2 for x in range(1234567)]  # ten  squares\r\n/path/to/file/// --- ...\n/"
    "Zwölf Boxkämpfer ÉCOLE naïve; Привет, МИР! 東京は今日も雨。 العربية हिन्दी e\u0301 ١٢٣٤   \n \n end "
)
# Under these transformers knows rules, too; `qwen2` brings texts to NFC besides, as Qwen's own tokenizer.json does.
KNOWN = (
    *("gpt-2", "llama-bpe", "dbrx", "smaug-bpe", "gpt-4o", "tekken", "qwen2", "deepseek-r1-qwen", "falcon3"),
    *("falcon-h1", "lfm2", "minimax-m2", "pixtral", "qwen35"),
)


def _write(path: Path, rules: str) -> Path:
    """Write a tokenizer whose merges cross every border of words, so that each cut shows."""
    tokenizer = Backend(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS[at : at + 80] for at in range(0, len(CORPUS), 3)], trainer)
    vocabulary = tokenizer.get_vocab()
    tokenizer.model.save(str(path.parent))
    merges = [line for line in (path.parent / "merges.txt").read_text("utf-8").splitlines() if line[:1] != "#"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rules)
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    for add in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        add()
    return path


@pytest.mark.parametrize("rules", KNOWN)
def test_texts_are_cut_as_transformers_cuts_them(tmp_path: Path, rules: str) -> None:
    path = _write(tmp_path / "m.gguf", rules)
    write_gguf_tokenizer(tmp_path / "tokenizer.json", GgufFields(gguf.GGUFReader(path)))
    ours = Backend.from_file(str(tmp_path / "tokenizer.json"))
    convert: Any = convert_gguf_tokenizer
    architecture, tokenizer, _ = get_gguf_tokenizer(str(path))
    theirs = convert(architecture, tokenizer)[0]
    text = CORPUS.replace("e\u0301", "é")
    for start in range(0, len(text), 7):
        assert ours.encode(text[start:]).ids == theirs.encode(text[start:]).ids


@pytest.mark.parametrize(
    ("rules", "parts"), [("refact", 4), ("starcoder", 4), ("command-r", 4), ("olmo", 1), ("exaone4", 1)]
)
def test_digits_stand_alone_where_the_rules_say_so(tmp_path: Path, rules: str, parts: int) -> None:
    write_gguf_tokenizer(tmp_path / "tokenizer.json", GgufFields(gguf.GGUFReader(_write(tmp_path / "m.gguf", rules))))
    words = Backend.from_file(str(tmp_path / "tokenizer.json")).pre_tokenizer.pre_tokenize_str("1234")
    assert len(words) == parts


TEXT = "x1 = 1234 + (y)\r\n  DeepSeek's Zwölf 東京は, ՀՅ"


@pytest.mark.parametrize(
    ("rules", "parts"),
    [
        ("deepseek-llm", "x|1| =| |1|2|3|4| +| (|y|)|\r|\n| | DeepSeek|'|s| Zw|ö|lf| |東京は|,| ՀՅ"),
        ("deepseek-coder", "x|1| = |1|2|3|4| +| (|y|)|\r|\n| | DeepSeek|'|s| Zwölf| |東京は|,| ՀՅ"),
        ("deepseek-v3", "x|1| =| |123|4| +| (|y|)\r\n| | DeepSeek|'s| Zwölf| |東京は|,| ՀՅ"),
        ("hunyuan-dense", "x|1| =| |123|4| +| (|y|)\r\n| | DeepSeek|'s| Zwölf| |東京は|,| ՀՅ"),
        ("glm4", "x|1| =| |123|4| +| (|y|)\r\n| | DeepSeek|'s| Zwölf| 東京は|,| ՀՅ"),
        ("hunyuan", "x|1| =| |1|2|3|4| +| (|y|)\r\n| | DeepSeek|'s| Zwölf| 東京は|,| ՀՅ"),
        ("seed-coder", "x|1| =| |1|2|3|4| +| (|y|)|\r\n| | DeepSeek|'s| Zwölf| 東京は|,| ՀՅ"),
    ],
)
def test_words_of_rules_that_transformers_does_not_know(tmp_path: Path, rules: str, parts: str) -> None:
    """V2's marks range over the Latin letters, too, and so part them from others within a word."""
    write_gguf_tokenizer(tmp_path / "tokenizer.json", GgufFields(gguf.GGUFReader(_write(tmp_path / "m.gguf", rules))))
    words = Backend.from_file(str(tmp_path / "tokenizer.json")).pre_tokenizer.pre_tokenize_str(TEXT)
    found = [TEXT[start:end] for _, (start, end) in words]
    assert found == parts.split("|")
