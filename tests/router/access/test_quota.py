"""Quotas over a clock that is moved by hand, of a router that counts for itself and of one that counts with others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import pytest

from kvferry.common.errors import CapacityError
from kvferry.router.access.quota import Allowance, QuotaLimits, Quotas
from kvferry.router.access.shared_accounts import SharedAccounts
from kvferry.settings.quota_board import QuotaBoard
from kvferry.tests.fake_clock import FakeClock


class MakeQuotas(Protocol):
    def __call__(self, limits: QuotaLimits, clock: FakeClock) -> Quotas: ...


@pytest.fixture(params=["own", "shared"])
def make_quotas(request: pytest.FixtureRequest) -> Iterator[MakeQuotas]:
    boards: list[QuotaBoard] = []

    def make(limits: QuotaLimits, clock: FakeClock) -> Quotas:
        if request.param == "own":
            return Quotas(limits, clock)
        boards.append(QuotaBoard.create(2))
        return Quotas(limits, clock, SharedAccounts(boards[-1], limits, clock))

    yield make
    for board in boards:
        board.close()


def test_without_limits_nothing_is_counted(make_quotas: MakeQuotas) -> None:
    quotas = make_quotas(QuotaLimits(), FakeClock())
    for _ in range(1000):
        allowance = quotas.enter(b"")
        allowance.charge(10**9)
        assert allowance.headers == []


def test_requests_come_back_evenly(make_quotas: MakeQuotas) -> None:
    clock = FakeClock()
    quotas = make_quotas(QuotaLimits(requests_per_minute=60), clock)
    for _ in range(60):
        quotas.enter(b"a").leave()
    with pytest.raises(CapacityError, match="60 requests a minute") as caught:
        quotas.enter(b"a")
    assert caught.value.retry_after_s == pytest.approx(1.0)
    clock.advance(1.0)
    quotas.enter(b"a").leave()
    with pytest.raises(CapacityError):
        quotas.enter(b"a")
    quotas.enter(b"b").leave()


def test_a_minute_of_silence_fills_the_bucket_and_no_more(make_quotas: MakeQuotas) -> None:
    clock = FakeClock()
    quotas = make_quotas(QuotaLimits(requests_per_minute=2), clock)
    clock.advance(3600.0)
    for _ in range(2):
        quotas.enter(b"").leave()
    with pytest.raises(CapacityError):
        quotas.enter(b"")


def test_a_request_larger_than_the_bucket_goes_when_it_is_full_and_leaves_a_debt(make_quotas: MakeQuotas) -> None:
    clock = FakeClock()
    quotas = make_quotas(QuotaLimits(tokens_per_minute=60), clock)
    allowance = quotas.enter(b"")
    allowance.charge(120)
    with pytest.raises(CapacityError, match="60 tokens a minute") as caught:
        quotas.enter(b"").charge(1)
    assert caught.value.retry_after_s == pytest.approx(61.0)
    allowance.settle(30)
    allowance.leave()
    quotas.enter(b"").charge(30)
    with pytest.raises(CapacityError):
        quotas.enter(b"").charge(1)


def test_what_nobody_settled_comes_back_whole_and_once(make_quotas: MakeQuotas) -> None:
    quotas = make_quotas(QuotaLimits(max_concurrency=1, tokens_per_minute=10), FakeClock())
    for _ in range(5):
        allowance = quotas.enter(b"")
        allowance.charge(10)
        with pytest.raises(CapacityError, match="1 requests at once") as refused:
            quotas.enter(b"")
        assert refused.value.retry_after_s == 1.0
        allowance.leave()
        allowance.leave()
    assert dict(quotas.enter(b"").headers)[b"x-ratelimit-remaining-tokens"] == b"10"


def left(allowance: Allowance, of: str = "requests") -> int:
    return int(dict(allowance.headers)[f"x-ratelimit-remaining-{of}".encode()])


@pytest.mark.parametrize("used", [0, 2])
def test_a_request_that_is_waived_costs_nothing_and_needs_none(make_quotas: MakeQuotas, used: int) -> None:
    quotas = make_quotas(QuotaLimits(requests_per_minute=2), FakeClock())
    for _ in range(used):
        quotas.enter(b"").leave()
    for _ in range(9):
        allowance = quotas.enter(b"", may_repeat=True)
        allowance.waive()
        allowance.leave()
        assert left(allowance) == 2 - used
    for _ in range(2 - used):
        quotas.enter(b"")
    with pytest.raises(CapacityError):
        quotas.enter(b"")


def test_requests_that_are_not_waived_are_debts_of_a_minute_at_most(make_quotas: MakeQuotas) -> None:
    """However many are under way at once, nobody is shut out for longer."""
    clock = FakeClock()
    quotas = make_quotas(QuotaLimits(requests_per_minute=2), clock)
    under_way = [quotas.enter(b"", may_repeat=True) for _ in range(4)]
    for may_repeat, wait_s in ((True, 30.0), (False, 90.0)):
        with pytest.raises(CapacityError, match="2 requests a minute") as refused:
            quotas.enter(b"", may_repeat=may_repeat)
        assert refused.value.retry_after_s == pytest.approx(wait_s)
    told = dict(under_way[-1].headers)
    assert (told[b"x-ratelimit-remaining-requests"], told[b"x-ratelimit-reset-requests"]) == (b"0", b"120.000s")
    for allowance in under_way:
        allowance.leave()
    clock.advance(89)
    with pytest.raises(CapacityError):
        quotas.enter(b"")
    clock.advance(1.1)
    quotas.enter(b"")


def test_what_may_repeat_an_answer_has_a_place(make_quotas: MakeQuotas) -> None:
    quotas = make_quotas(QuotaLimits(max_concurrency=1, requests_per_minute=9), FakeClock())
    allowance = quotas.enter(b"", may_repeat=True)
    for may_repeat in (True, False):
        with pytest.raises(CapacityError, match="1 requests at once"):
            quotas.enter(b"", may_repeat=may_repeat)
    allowance.leave()
    quotas.enter(b"", may_repeat=True)


def test_what_costs_no_tokens_goes_on_beside_a_debt(make_quotas: MakeQuotas) -> None:
    quotas = make_quotas(QuotaLimits(tokens_per_minute=10), FakeClock())
    quotas.enter(b"").charge(30)
    quotas.enter(b"").charge(0)
    with pytest.raises(CapacityError):
        quotas.enter(b"").charge(1)
