from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvferry.benchmarks.isa.isa import Case, main
from kvferry.benchmarks.shared.bars import exit_code
from kvferry.engine.cpu.build import usable_sets
from kvferry.engine.cpu.compiler import NativeUnavailable, find_compiler

from ...checkpoints import write_checkpoint

SMALL = ["--decode", "1@20,2@40", "--prefill", "30", "--rounds", "2", "--prompt-rounds", "1"]


def test_a_processor_without_avx2_has_no_speedup_and_keeps_no_bar() -> None:
    case = Case("decode 1@128", {"torch, AVX2": 1.0, "neon": 0.5}, 3)
    assert case.speedup is None and exit_code([case.bar]) == 1
    assert exit_code([Case("decode 1@128", {"torch, AVX2": 2.0, "avx2": 1.0}, 3).bar]) == 0


def test_nothing_to_measure_is_a_wrong_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--decode", "", "--prefill", "", "--check"]) == 2
    assert "isa: no case is left" in capsys.readouterr().err


def test_every_set_of_the_processor_stands_beside_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        sets = usable_sets()
        find_compiler()
    except NativeUnavailable as reason:
        pytest.skip(f"no native code on this machine: {reason}")
    monkeypatch.setattr("os.environ", dict(os.environ))  # as before, afterwards
    model_dir, result = write_checkpoint(tmp_path / "tiny", tokenizer=False), tmp_path / "result.json"
    assert main(["--model", str(model_dir), *SMALL, "--json", str(result)]) == 0
    report = json.loads(result.read_text())
    cases = report["cases"]
    assert len(report["bars"]) == len(cases)
    assert [case["name"] for case in cases] == ["decode 1@20", "decode 2@40", "prefill 30"]
    assert all(set(case["ms"]) == {*sets, "torch, AVX2"} for case in cases)
