"""The fleet's simulation, small: every request is served, and its cost is split between router and workers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvferry.benchmarks.fleet import fleet
from kvferry.benchmarks.fleet.fleet import FleetRun, bars_of, run
from kvferry.benchmarks.shared.bars import exit_code


def test_a_small_fleet_serves_everything_and_says_what_it_cost() -> None:
    found = run(10, 100, "sample:azure-2023-conv")
    assert (found.num_workers, found.num_requests, found.num_unfinished) == (10, 100, 0)
    assert 0 < found.router_s < found.cpu_s
    assert found.submit_p50_us is not None and found.submit_p99_us is not None
    assert 0 < found.submit_p50_us <= found.submit_p99_us
    assert found.us_per_request > found.router_us


def test_every_bar_has_a_figure_or_is_missed() -> None:
    whole = FleetRun(1000, 1_000_000, 1500.0, 800.0, 300.0, 700.0, 1.0, 0)
    assert exit_code(bars_of(whole)) == 0
    for worse in ({"submit_p99_us": None}, {"num_unfinished": 1}, {"cpu_s": 1801.0}):
        assert [bar.is_met for bar in bars_of(replace(whole, **worse))].count(False) == 1


def test_the_command_is_kept_as_it_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fleet, "run", lambda *_: FleetRun(10, 1000, 1.0, 0.5, 300.0, 700.0, 1.0, 0))
    monkeypatch.setattr(fleet, "collect_rarely", lambda: None)
    words = ["--trace", "sample:azure-2023-code", "--json", f"{tmp_path}/x.json", "--plot", f"{tmp_path}/x.svg"]
    assert fleet.main(words) == 0
    kept = json.loads((tmp_path / "x.json").read_text())["environment"]["command"]
    assert kept == f"python -m kvferry.benchmarks.fleet {' '.join(words)}"
