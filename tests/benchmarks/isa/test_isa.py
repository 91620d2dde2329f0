from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvferry.benchmarks.isa.isa import main
from kvferry.engine.cpu.build import usable_sets
from kvferry.engine.cpu.compiler import NativeUnavailable, find_compiler

from ...checkpoints import write_checkpoint

SMALL = ["--decode", "1@20,2@40", "--prefill", "30", "--rounds", "2", "--prompt-rounds", "1"]


def test_every_set_of_the_processor_stands_beside_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        sets = usable_sets()
        find_compiler()
    except NativeUnavailable as reason:
        pytest.skip(f"no native code on this machine: {reason}")
    monkeypatch.setattr("os.environ", dict(os.environ))  # as before, afterwards
    model_dir, result = write_checkpoint(tmp_path / "tiny", tokenizer=False), tmp_path / "result.json"
    assert main(["--model", str(model_dir), *SMALL, "--json", str(result)]) == 0
    cases = json.loads(result.read_text())["cases"]
    assert [case["name"] for case in cases] == ["decode 1@20", "decode 2@40", "prefill 30"]
    assert all(set(case["ms"]) == {*sets, "torch, AVX2"} for case in cases)
