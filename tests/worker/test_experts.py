"""Routers are told of experts in some heartbeats alone."""

from __future__ import annotations

from kvferry.tests.fake_clock import FakeClock
from kvferry.wire.workers import MAX_EXPERT_COUNTS, ExpertCounts
from kvferry.worker.experts import REPORT_S, ExpertReports


def test_each_router_is_told_what_is_new_once_in_a_while() -> None:
    clock, taken = FakeClock(), [3, 0]
    reports = ExpertReports(lambda: (ExpertCounts(0, tuple(taken)),), clock)
    assert reports.due("r-0") == (ExpertCounts(0, (3, 0)),)
    taken[1] = 1
    assert reports.due("r-0") == ()
    assert reports.due("r-1") == (ExpertCounts(0, (3, 1)),)
    clock.advance(REPORT_S)
    assert reports.due("r-0") == (ExpertCounts(0, (3, 1)),)
    clock.advance(REPORT_S)
    assert reports.due("r-0") == ()  # as before
    reports.forget("r-0")
    assert reports.due("r-0") == (ExpertCounts(0, (3, 1)),)


def test_more_than_a_message_holds_is_not_told() -> None:
    many = ExpertCounts(0, (1,) * 4096)
    reports = ExpertReports(lambda: (many,) * (MAX_EXPERT_COUNTS // 4096 + 1), FakeClock())
    assert reports.due("r-0") == ()
