"""Times of quantized forms beside the plain one's, and their bars."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvferry.benchmarks.quantization import speed


@pytest.mark.parametrize(("int4_ms", "missed"), [(4.4, 0), (4.6, 1)])
def test_a_missed_bar_is_written_and_is_the_exit_code_of_a_check(
    int4_ms: float, missed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", dict(os.environ))  # as before, afterwards
    for name in ("_engine", "decoding", "prefilling"):
        monkeypatch.setattr(speed, name, lambda *args: lambda: None)
    times = {"plain": 10.0, "int8": 6.0, "int4": int4_ms}
    monkeypatch.setattr(speed, "least_ms", lambda runs, rounds: {kind: times[kind] for kind in runs})
    flags = ["--kinds", "plain,int8,int4", "--decode", "1@160,8@160", "--json", str(tmp_path / "s.json")]
    assert speed.main(flags) == 0
    bars = json.loads((tmp_path / "s.json").read_text())["bars"]
    assert sum(not bar["is_met"] for bar in bars) == missed and len(bars) == 10
    assert speed.main([*flags, "--check"]) == missed
    assert speed.main([*flags, "--kinds", "plain", "--check"]) == 2  # nothing stands beside it
