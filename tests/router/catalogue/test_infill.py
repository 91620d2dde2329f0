"""The tokens of each family for filling in a middle, and the prompt that they make."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from kvferry.models.tokenizer import Tokenizer
from kvferry.router.catalogue.infill import InfillForm
from kvferry.tests.router.fakes import toy_tokenizer

FAMILIES = {
    "qwen": ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|endoftext|>"],
    "starcoder": ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>"],
    "santacoder": ["<fim-prefix>", "<fim-suffix>", "<fim-middle>"],
    "deepseek": ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
    "code llama": ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"],
}


def tokenizer_with(tokens: list[str]) -> Tokenizer:
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.add_special_tokens(tokens)
    return Tokenizer(backend, toy_tokenizer().decoder, special_tokens={})


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_its_form(family: str) -> None:
    tokens = FAMILIES[family]
    form = InfillForm.of(tokenizer_with(tokens))
    assert form is not None
    assert form.prompt([9], [0, 0], [1]) == [9, 2, 0, 0, 3, 1, 4]
    assert sorted(form.ends) == list(range(2, 2 + len(tokens)))


def test_a_model_with_a_part_of_them_has_none() -> None:
    assert InfillForm.of(tokenizer_with(["<fim_prefix>", "<|fim_suffix|>", "<fim_middle>"])) is None
    assert InfillForm.of(toy_tokenizer()) is None
