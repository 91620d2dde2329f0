"""Many faulted requests without a breach, in two parts that can run side by side, each with its residue of seeds."""

from __future__ import annotations

from .runner import render, run_requests
from .scenario import KINDS

NUM_HALVES = 2
NUM_REQUESTS = 6_000  # of both; `make long` runs 200,000
# What the faults must have reached, or they are not about what they are meant for.
WAYS = (
    *("landings of a part of each page", "reads by other ranks"),
    *("late landings", "rotations", "preemptions", "messages doubled", "work of the other role refused"),
    *("role change with prompt", "role change with shipment", "role change with answer", "role change in a drain"),
    *("role change with granted reservation", "role change with open reservation"),
    *("fetched blocks", "fetches that failed", "lent blocks", "arrival corrupt", "pages spoiled"),
    *("matchers", "matchers brought up", "rows postponed", "steps stopped", "grammars that an answer waited for"),
    *("adapters read", "adapters loaded from host memory", "adapters forgotten"),
    *("embedded prompts", "embedded after a retry"),
    *("drafted tokens", "accepted drafted tokens", "draft model's prompt tokens"),
    *("workers added", "workers removed", "roles changed by the autoscaler"),
    "rows behind states",
    *("promoted blocks", "demoted blocks", "disk read", "disk write failed"),
)


def check_half(number: int) -> None:
    """Run one half of the requests: no invariant breaks, every kind of fault happens, every way is taken."""
    report = run_requests(NUM_REQUESTS // NUM_HALVES, 1 + number, NUM_HALVES)
    assert not report.failures, render(report)
    assert {name.partition("@")[0] for name in report.tally.faults} == set(KINDS)
    assert not [way for way in WAYS if not report.tally.seen[way]], render(report)
