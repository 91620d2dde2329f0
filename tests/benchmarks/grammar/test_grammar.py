"""Schemas are drawn and unpacked, answers are judged, and figures stand beside their bars."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import httpx
import jsonschema
import pytest

from kvferry.benchmarks.grammar.asking import Asked, Pair, _judged
from kvferry.benchmarks.grammar.grammar import Report
from kvferry.benchmarks.grammar.schemas import DRAFT, SDIST, Case, generated, suite
from kvferry.common.grammar import Grammar
from kvferry.grammar.matching import Vocabulary, compile_grammar
from kvferry.tests.checkpoints import write_tokenizer

CASE = Case("generated", "0", {"type": "object", "required": ["a"]})


def _answer(status: int, **body: object) -> httpx.Response:
    return httpx.Response(status, json=body)


def _whole(text: str, finish: str = "stop") -> httpx.Response:
    choice = {"finish_reason": finish, "message": {"content": text}}
    return _answer(200, choices=[choice], usage={"completion_tokens": 7})


def test_generated_schemas_are_schemas_the_same_for_a_seed_and_can_be_followed(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 512)
    vocabulary = Vocabulary.from_dir(tmp_path, vocab_size=512, eos_token_ids=frozenset({1}))
    cases = list(generated(60, seed=1))
    assert cases == list(generated(60, seed=1)) != list(generated(60, seed=2))
    for case in cases:
        jsonschema.Draft202012Validator.check_schema(case.schema)
        compile_grammar(vocabulary, Grammar("json_schema", json.dumps(case.schema).encode()))


def test_the_suite_is_what_the_distribution_has_of_its_draft(tmp_path: Path) -> None:
    groups = [{"description": "d", "schema": {"type": "null"}, "tests": []}, {"description": "b", "schema": True}]
    files = {f"json/tests/{DRAFT}/type.json": groups, f"json/tests/{DRAFT}/optional/x.json": groups, "README": []}
    with tarfile.open(tmp_path / SDIST, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"jsonschema-4/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert suite(tmp_path) == [Case("suite", "type: d", {"type": "null"})]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (_whole('{"a": 1}'), Asked("generated", "0", 200, "stop", True, "", 7)),
        (_whole('{"b": 1}'), Asked("generated", "0", 200, "stop", False, "", 7)),
        (_whole("{"), Asked("generated", "0", 200, "stop", False, "", 7)),
        (_whole("{", "length"), Asked("generated", "0", 200, "length", False, "", 7)),
        (
            _answer(400, error={"param": "response_format.json_schema.schema.items.not", "message": "no"}),
            Asked("generated", "0", 400, "", False, "not", 0),
        ),
        (
            _answer(400, error={"param": "response_format", "message": "'x' cannot be followed"}),
            Asked("generated", "0", 400, "", False, "cannot be followed", 0),
        ),
    ],
)
def test_answers_are_judged_by_another_library(answer: httpx.Response, wanted: Asked) -> None:
    assert _judged(CASE, answer) == wanted


def test_figures_are_pairs_and_bars_are_kept_or_missed() -> None:
    asked = [_judged(CASE, _whole('{"a": 1}')), _judged(CASE, _whole("{}"))]
    pairs = [Pair((1.0, 1.002), ((0.1, 0.1), (0.1, 0.12)))] * 3
    bars = {bar.what: bar for bar in Report(asked, pairs).bars()}
    assert bars["finished answers that do not validate"].value == 1
    assert not bars["finished answers that do not validate"].is_met
    assert bars["TPOT p50, of unconstrained"].value == pytest.approx(1.1)
    assert bars["TTFT more with a new schema, p50"].value == pytest.approx(2.0)
    assert bars["refused, suite"].value is None and bars["refused, suite"].is_met
