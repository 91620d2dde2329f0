from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvferry.benchmarks.adapters.adapters import Load, Report, main
from kvferry.benchmarks.adapters.first_tokens import FirstTokens
from kvferry.benchmarks.shared.bars import exit_code
from kvferry.tools.load.environment import describe_environment

from ...checkpoints import write_checkpoint


def _report(step_ms: dict[str, float], num_rows: int, added_ms: float = 10.0) -> Report:
    first = FirstTokens(128, 8, 60.0, 50.0, added_ms)
    return Report("m", "r", 1, 16, num_rows, step_ms, 20, (Load(16, 20_000_000, 30.0, 30.0),), first,
                  describe_environment("adapters", []))  # fmt: skip


def test_bars_are_held_for_one_adapter_for_many_and_where_one_row_has_one() -> None:
    assert exit_code(_report({"0": 10.0, "1": 11.0, "8": 13.5}, 8).bars()) == 0
    assert exit_code(_report({"0": 10.0, "1": 11.1, "8": 13.5}, 8).bars()) == 1
    assert exit_code(_report({"0": 10.0, "1": 11.0, "8": 13.6}, 8).bars()) == 1
    assert exit_code(_report({"0": 10.0, "1": 11.0}, 1).bars()) == 0
    assert exit_code(_report({"0": 10.0, "1": 11.1}, 1).bars()) == 1
    assert exit_code(_report({"0": 10.0, "1": 11.0}, 1, added_ms=51.0).bars()) == 1


def test_steps_with_and_without_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", dict(os.environ))  # as before, afterwards
    model_dir, result = write_checkpoint(tmp_path / "tiny"), tmp_path / "result.json"
    small = [
        "--rows",
        "2",
        "--rounds",
        "2",
        "--context",
        "20",
        "--rank",
        "8",
        "--large-rank",
        "16",
        "--large-gb",
        "1e-3",
    ]
    assert main(["--model", str(model_dir), *small, "--json", str(result)]) == 0
    found = json.loads(result.read_text())
    assert set(found["step_ms"]) == {"0", "1", "2"} and [load["rank"] for load in found["loads"]] == [8, 16, 16]
    assert found["first_tokens"]["num_pairs"] == 2
