"""The comparison's bars are its exit code where that is asked for; a peer that is not there is told."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from kvferry.benchmarks.llama_cpp import llama_cpp
from kvferry.benchmarks.llama_cpp.llama_cpp import DECODE_BAR, PREFILL_BAR, Case, main


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", dict(os.environ))  # as before, afterwards
    monkeypatch.setattr(llama_cpp, "find_gguf", lambda: Path("model.gguf"))


@pytest.mark.parametrize(("decode_ms", "missed"), [(9.0, 0), (9.9, 1)])
def test_a_missed_bar_is_written_and_is_the_exit_code_of_a_check(
    decode_ms: float, missed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(flags: object, kind: str, file: Path) -> list[Case]:
        prompt, step = ("prefill 512", 7.0, 10.0, PREFILL_BAR, 5), ("decode 1@128", decode_ms, 10.0, DECODE_BAR, 30)
        return [Case(kind, *prompt), Case(kind, *step)]

    monkeypatch.setattr(llama_cpp, "_measure", measured)
    monkeypatch.setattr(llama_cpp, "_quantize", lambda *args: None)
    flags = ["--peer", "python", "--kinds", "Q4_0", "--json", str(tmp_path / "l.json")]
    assert main(flags) == 0
    bars = json.loads((tmp_path / "l.json").read_text())["bars"]
    assert [bar["is_met"] for bar in bars] == [True, not missed]
    assert main([*flags, "--check"]) == missed


@pytest.mark.parametrize(("peer", "told"), [("/nonexistent", "--peer /nonexistent"), (sys.executable, "made no Q4_0")])
def test_a_peer_that_cannot_be_run_is_told(
    peer: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--peer", peer, "--json", str(tmp_path / "l.json")]) == 2
    assert told in capsys.readouterr().err
