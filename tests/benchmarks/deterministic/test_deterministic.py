from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvferry.benchmarks.deterministic.deterministic import main

from ...checkpoints import write_checkpoint

SMALL = ["--dtype", "float32", "--decode", "1@20,2@40", "--prefill", "30", "--rounds", "2", "--prompt-rounds", "1"]


def test_costs_are_measured_in_pairs_and_exact_results_do_not_move(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir, result = write_checkpoint(tmp_path / "tiny", tokenizer=False), tmp_path / "result.json"
    assert main(["--model", str(model_dir), *SMALL, "--json", str(result)]) == 0
    figures = json.loads(result.read_text())
    assert [(cost["name"], cost["num_pairs"]) for cost in figures["costs"]] == [
        ("decode 1@20", 2),
        ("decode 2@40", 2),
        ("prefill 30", 1),
    ]
    assert all(cost["ratio"] > 0 for cost in figures["costs"])
    off, on = figures["moved"]
    assert (off["deterministic"], on["deterministic"], on["num_moved"]) == (False, True, 0)
    assert on["num_compared"] == off["num_compared"] == 3 * 599
    assert "on: 0 of 1797 log-probabilities move" in capsys.readouterr().out


def test_what_cannot_be_measured_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path), *SMALL, "--json", str(tmp_path / "result.json")]) == 2
    assert "deterministic:" in capsys.readouterr().err
