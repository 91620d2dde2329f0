from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvferry.benchmarks.adapters.adapters import main

from ...checkpoints import write_checkpoint


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
