"""New adapters are loaded into a live server one after the other, and each is asked for twice."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvferry.benchmarks.adapters.swapping import Swap, main

from ...checkpoints import write_checkpoint


def test_what_a_call_and_a_first_request_cost_is_added() -> None:
    assert Swap(call_ms=20.0, first_ms=50.0, again_ms=40.0).added_ms == 30.0


@pytest.mark.slow
def test_each_new_adapter_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.sched_getaffinity(0)
    monkeypatch.setattr("kvferry.benchmarks.adapters.swapping.pin_to_cores", lambda number: tuple(sorted(cores)))
    model, result = write_checkpoint(tmp_path / "tiny", vocab_size=512), tmp_path / "result.json"
    flags = ["--systems", "kvferry-co", "--model", str(model), "--adapters", "2", "--json", str(result)]
    assert main(flags) == 0
    [row] = json.loads(result.read_text())["rows"]
    assert row["system"] == "kvferry-co" and len(row["swaps"]) == 2
    assert all(swap["call_ms"] > 0 and swap["first_ms"] > 0 and swap["again_ms"] > 0 for swap in row["swaps"])
