"""Schemas are drawn and unpacked, answers are judged, and figures stand beside their bars."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import httpx
import jsonschema
import pytest

from kvferry.benchmarks.grammar import grammar, hostile
from kvferry.benchmarks.grammar.asking import Asked, Pair, _judged
from kvferry.benchmarks.grammar.grammar import Report, main
from kvferry.benchmarks.grammar.schemas import DRAFT, SDIST, Case, generated, suite
from kvferry.benchmarks.shared.bars import exit_code
from kvferry.common.grammar import Grammar
from kvferry.grammar.matching import Vocabulary, compile_grammar
from kvferry.tests.checkpoints import write_tokenizer
from kvferry.tools.load.server_process import free_port

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
    assert bars["neither answered nor refused"].is_met
    assert bars["TPOT p50, of unconstrained"].value == pytest.approx(1.1)
    assert bars["TTFT more with a new schema, p50"].value == pytest.approx(2.0)
    assert bars["refused, suite"].value is None and bars["refused, suite"].is_met


def test_answers_that_are_neither_whole_nor_refusals_keep_no_bar() -> None:
    strange = [Asked("suite", "a", status, "", False, "no such model", 0) for status in (404, 429, 500)]
    bars = {bar.what: bar for bar in Report(strange, []).bars()}
    assert bars["neither answered nor refused"].value == 3 and exit_code(list(bars.values())) == 1
    assert not bars["finished answers that do not validate"].is_met  # none finished
    refused = Report([Asked("suite", "a", 400, "", False, "not", 0)], []).bars()
    assert exit_code(refused) == 1 and refused[1].is_met


@pytest.mark.parametrize(("status", "code"), [(404, 2), (429, 2), (400, 1)])
def test_a_server_that_answers_nothing_is_told(
    status: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report([Asked("generated", "0", status, "", False, "no", 0)] * 3, [])
    monkeypatch.setattr(grammar, "suite", lambda folder: [])
    monkeypatch.setattr(grammar, "_run", lambda *args: report)
    assert main(["--json", str(tmp_path / "g.json")]) == code
    assert (tmp_path / "g.json").exists() == (code == 1)
    assert ("no schema was answered or refused" in capsys.readouterr().err) == (code == 2)
    assert main(["--suite", "0", "--generated", "0"]) == 2


def test_a_url_without_a_server_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grammar, "suite", lambda folder: [])
    url = f"http://127.0.0.1:{free_port()}/v1"
    assert main(["--url", url, "--generated", "1", "--json", str(tmp_path / "g.json")]) == 2
    assert f"grammar: --url {url}: " in capsys.readouterr().err


# --- hostile --------------------------------------------------------------------------------------------------


def _pair(kind: str, status: int, gap_s: float = 0.01) -> hostile.Pair:
    return hostile.Pair(kind, hostile.Window([0.01] * 100, [], []), hostile.Window([gap_s] * 100, [0.1], [status]))


@pytest.mark.parametrize(
    ("pair", "missed"),
    [
        (_pair("depth-300", 400), []),
        (_pair("regex", 200), []),
        (_pair("depth-300", 200), ["depth-300: not refused"]),
        (_pair("regex", 400), ["regex: not answered"]),
        (_pair("regex", 503), ["regex: not answered"]),
        (_pair("regex", 200, gap_s=1.0), ["regex: p99 gap, of without"]),
    ],
)
def test_a_hostile_schema_is_answered_as_its_kind_has_to_be(pair: hostile.Pair, missed: list[str]) -> None:
    bars = hostile.bars([pair])
    assert [bar.what for bar in bars if not bar.is_met] == missed
    assert exit_code(bars) == (1 if missed else 0)


def test_a_kind_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        hostile.main(["--kinds", "regex,deph-300"])
    assert "deph-300: choose from" in capsys.readouterr().err
