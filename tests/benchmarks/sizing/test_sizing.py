"""What the calculator's benchmark compares, and with what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import structlog

from kvferry.benchmarks.sizing import published
from kvferry.benchmarks.sizing.ratio import Ratio
from kvferry.benchmarks.sizing.sizing import main


@pytest.fixture(autouse=True)
def _restore_logs() -> None:
    structlog.reset_defaults()


def test_published_figures_are_of_four_sources_and_most_are_met() -> None:
    rows = list(published.rows())
    assert {row.source for row in rows} == {"NVIDIA", "vLLM", "DeepSeek", "SGLang"}
    long = [row for row in rows if "2,048" in row.what or row.source == "vLLM"]
    assert len(long) == 7 and all(row.is_met for row in long)
    assert all(0.4 < row.computed_ms / row.published_ms < 1.25 for row in rows), "a published step is rarely a bound"


def test_parts_are_kept_beside_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sizing.json"
    path.write_text(json.dumps({"cpu": {"rows": []}}))
    assert main(["--parts", "published", "--json", str(path)]) == 0
    body = json.loads(path.read_text())
    assert body["cpu"] == {"rows": []} and len(body["published"]["rows"]) == 13
    assert "MISSED" in capsys.readouterr().out
    assert main(["--parts", "published", "--json", str(path), "--check"]) == 1


def test_a_split_is_best_when_none_is_better_by_more_than_the_search_tells_apart() -> None:
    rates = (("1:3", 10.0), ("2:2", 9.9), ("3:1", 9.0))
    assert Ratio("t", "3:1", "2:2", rates).is_best
    assert not Ratio("t", "2:2", "3:1", rates).is_best
