"""`kvferry simulate`: from flags to a table, figures and a plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import structlog

from kvferry.simulator.command import main

SMALL = ["--trace", "sample:azure-2023-conv", "--requests", "40", "--rate", "8", "--prefill", "1", "--decode", "1"]


@pytest.fixture(autouse=True)
def _restore_logs() -> None:
    structlog.reset_defaults()


def test_policies_are_run_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, plot = tmp_path / "runs.json", tmp_path / "runs.svg"
    words = [*SMALL, "--policy", "slo,colocated", "--oracle", "--json", str(figures), "--plot", str(plot)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "colocated" in shown and "Bound of an oracle" in shown
    runs = json.loads(figures.read_text())["runs"]
    assert [run["name"] for run in runs] == ["slo", "colocated"]
    assert all(run["num_requests"] == 40 and run["attainment"] > 0.9 for run in runs)
    assert plot.read_text().startswith("<?xml")


def test_spikes_and_failures_are_read_from_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--spike", "2:1:5", "--fail", "prefill-0@2+1", "--policy", "least_loaded"]) == 0
    assert "least_loaded" in capsys.readouterr().out


def test_the_highest_good_rate_is_searched(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--capacity", "--policy", "least_loaded"]) == 0
    assert "least_loaded at " in capsys.readouterr().out


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--model", "deepseek-v3", "--tensor-parallel-size", "8"]) == 2
    assert "671 GB of weights" in capsys.readouterr().err
