"""Where tokenizer_config.json and tokenizer.json differ about tokens, texts are read as `transformers` reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvferry.common.errors import ConfigError
from kvferry.models.tokenizer import Tokenizer
from kvferry.models.tokenizer_files import read_end_tokens

from ..checkpoints import EOS, write_tokenizer

Json = dict[str, Any]
TEXT = f"The {EOS} router <|im_end|> x <|new|> y"
NEW = 417  # tokens that the file has


def _told(number: int, content: str, **flags: bool) -> Json:
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"added_tokens_decoder": {str(number): {"content": content, "special": True, **plain, **flags}}}


def _write(path: Path, change: Callable[[Json], object], told: Json) -> Path:
    write_tokenizer(path, 500)
    file, config = path / "tokenizer.json", path / "tokenizer_config.json"
    tokenizer = json.loads(file.read_text())
    change(tokenizer)
    file.write_text(json.dumps(tokenizer))
    config.write_text(json.dumps(json.loads(config.read_text()) | told))
    return path


def _as_it_is(tokenizer: Json) -> None:
    assert len(tokenizer["model"]["vocab"]) == NEW


def _without_flags(tokenizer: Json) -> None:
    for token in tokenizer["added_tokens"]:
        token["special"] = False


def _without_tokens(tokenizer: Json) -> None:
    tokenizer["added_tokens"] = []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_as_it_is, {}),
        (_without_flags, {}),
        (_without_flags, {"pad_token": "<|im_end|>"}),
        (_without_flags, {"image_token": "<|im_end|>"}),
        (_without_tokens, {}),
        (_without_tokens, _told(3, "<|im_end|>")),
        (_as_it_is, _told(3, "<|im_end|>", lstrip=True, rstrip=True)),
        (_as_it_is, _told(NEW, "<|new|>")),
        (_as_it_is, _told(NEW, "<|new|>", special=False)),
    ],
)
def test_texts_have_the_tokens_that_they_have_in_transformers(
    tmp_path: Path, change: Callable[[Json], object], told: Json
) -> None:
    from transformers import AutoTokenizer

    path = _write(tmp_path, change, told)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    auto: Any = AutoTokenizer
    theirs, ours = auto.from_pretrained(path), Tokenizer.from_dir(path)
    ids = ours.encode(TEXT)
    assert ids == theirs(TEXT)["input_ids"] and ours.eos_token_id in ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert read_end_tokens(path) == [ours.eos_token_id]


def test_a_piece_of_plain_text_that_pads_is_shown(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(_write(tmp_path, _as_it_is, {"pad_token": "x", "unk_token": "y"}))
    assert tokenizer.decode(tokenizer.encode("The x router y")) == "The x router y"


def test_special_tokens_of_texts_are_split_where_the_model_says_so_as_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = _write(tmp_path, _as_it_is, {"split_special_tokens": True})
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    auto: Any = AutoTokenizer
    ours = Tokenizer.from_dir(path)
    ids = ours.encode(TEXT)
    assert ids == auto.from_pretrained(path)(TEXT)["input_ids"] and ours.eos_token_id not in ids
    special = ours.special_text()
    [message], hidden = special.hide([{"content": EOS}])
    assert special.encode(f"{EOS} {message['content']}", hidden, False) == ours.encode(f"{EOS} {EOS}", False)


@pytest.mark.parametrize("told", [None, "yes", 1])
def test_a_split_that_is_neither_true_nor_false_is_refused(tmp_path: Path, told: object) -> None:
    path = _write(tmp_path, _as_it_is, {"split_special_tokens": told})
    with pytest.raises(ConfigError, match=f"split_special_tokens = {told!r} must be true or false"):
        Tokenizer.from_dir(path)


def test_no_token_gets_another_id_than_it_is_told_with(tmp_path: Path) -> None:
    told = {**_told(NEW + 1, "<|new|>")["added_tokens_decoder"], **_told(7, "<|im_end|>")["added_tokens_decoder"]}
    tokenizer = Tokenizer.from_dir(_write(tmp_path, _as_it_is, {"added_tokens_decoder": told}))
    assert tokenizer.added_id("<|new|>") is None and tokenizer.added_id("<|im_end|>") == 3
