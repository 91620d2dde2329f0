"""The fleet's simulation, small: every request is served, and its cost is split between router and workers."""

from __future__ import annotations

from kvferry.benchmarks.fleet.fleet import run


def test_a_small_fleet_serves_everything_and_says_what_it_cost() -> None:
    found = run(10, 100, "sample:azure-2023-conv")
    assert (found.num_workers, found.num_requests, found.num_unfinished) == (10, 100, 0)
    assert 0 < found.router_s < found.cpu_s
    assert found.submit_p50_us is not None and found.submit_p99_us is not None
    assert 0 < found.submit_p50_us <= found.submit_p99_us
    assert found.us_per_request > found.router_us
