from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvferry.benchmarks.quantization.quantization import main

from ...checkpoints import write_checkpoint


def test_forms_of_the_weights_are_set_beside_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_dir, result = write_checkpoint(tmp_path / "tiny"), tmp_path / "result.json"
    flags = ["--dtype", "float32", "--kinds", "plain,int8,int4", "--tokens", "100"]
    assert main(["--model", str(model_dir), *flags, "--json", str(result)]) == 0
    figures = json.loads(result.read_text())
    plain, int8, int4 = figures["qualities"]
    assert figures["num_tokens"] == 99 and plain["distance"] == 0 and plain["same_best"] == 1
    assert 0 < int8["distance"] < int4["distance"]
    assert "perplexity" in capsys.readouterr().out


def test_what_cannot_be_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path), "--json", str(tmp_path / "result.json")]) == 2
    assert "quantization:" in capsys.readouterr().err
