"""The fleet's simulation, small: every request is served, and its cost is split between router and workers."""

from __future__ import annotations

from dataclasses import replace

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
