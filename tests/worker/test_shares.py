"""How much of a worker each of several routers may use."""

from __future__ import annotations

from kvferry.tests.fake_clock import FakeClock
from kvferry.worker.shares import LATELY_S, RouterShares


def test_a_router_alone_has_all_of_it() -> None:
    shares = RouterShares(FakeClock())
    shares.note_work("a")
    assert shares.share("a", {"a"}) == 1.0


def test_those_that_have_work_or_were_heard_lately_share_and_who_begins_gets_a_part() -> None:
    clock = FakeClock()
    shares = RouterShares(clock)
    shares.note_work("a")
    assert [shares.share(router, {"b"}) for router in ("a", "b", "c")] == [1 / 2, 1 / 2, 1 / 3]
    clock.advance(LATELY_S)
    assert [shares.share(router, {"b"}) for router in ("a", "b")] == [1 / 2, 1.0], "what is unused flows back"
