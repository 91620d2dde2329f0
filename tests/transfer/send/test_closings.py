"""A decode worker is told how a shipment ended until it has heard it, however long it was away."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvferry.tests.decode.bench import REGION, SPEC
from kvferry.transfer.backends.base import TransferState
from kvferry.transfer.send.closings import FAILED_AFTER_S, GIVE_UP_S, MIN_INTERVAL_S, STUCK_AFTER_S, Closings
from kvferry.transfer.send.shipment import Shipment
from kvferry.wire.fields import Message
from kvferry.wire.grants import GrantId, GrantInfo
from kvferry.wire.handoff import KVClosed

GRANT = GrantInfo(
    grant_id=GrantId("d", 1, 1),
    spec=SPEC,
    kv_address="127.0.0.1:1",
    block_ids=(0,),
    num_tokens=16,
    num_computed_tokens=0,
    ranks=(REGION,),
    open_within_s=2.0,
    mac=b"",
)


@pytest.mark.parametrize("is_clean", [False, True])
def test_an_end_is_told_after_an_hour_of_outage_and_ever_more_rarely(is_clean: bool) -> None:
    told: list[tuple[float, KVClosed]] = []
    now = 0.0

    def to_peer(address: str, message: Message) -> None:
        assert address == GRANT.kv_address and isinstance(message, KVClosed)
        told.append((now, message))

    closings = Closings(0, to_peer, copies_itself=True)
    closings.add(Shipment(7, "a", 0, GRANT, [], 0.0, 0.0, 0.0), now, "it failed", clean=is_clean, has_failed=True)
    while now < GIVE_UP_S - 1.0:
        now += 0.5
        if closings.wants_new_agent(now):
            closings.detached(now)
        closings.repeat(now, 1.0)
        wake_at = closings.next_call_at(1.0)
        assert wake_at is not None and wake_at > now
    times = [at_s for at_s, _ in told]
    assert all(later - at_s <= 1.0 + 0.11 * at_s for at_s, later in pairwise(times))
    assert now - times[-1] <= 0.1 * now + 1.0 and len(told) < 120
    last = told[-1][1]
    assert last.clean is is_clean and last.detached is not is_clean
    assert is_clean or times[1] <= 1.0 < FAILED_AFTER_S
    closings.acked(7)
    assert not closings and closings.next_call_at(1.0) is None


def test_nobody_is_told_for_ever() -> None:
    bench = Bench()
    bench.add(0, clean=True)
    for after_s in (GIVE_UP_S - 1.0, GIVE_UP_S):
        assert bench.closings
        bench.closings.repeat(100.0 + after_s, 1.0)
    assert not bench.closings


class Bench:
    """Closings, and what was told, with shipments that have ended at 100 s."""

    def __init__(self, *, copies_itself: bool = True) -> None:
        self.told: list[KVClosed] = []
        self.closings = Closings(3, self._to_peer, copies_itself=copies_itself)

    def _to_peer(self, kv_address: str, message: Message) -> None:
        assert isinstance(message, KVClosed) and message.source_rank == 3
        self.told.append(message)

    def add(self, num_writes: int, *, clean: bool = False, has_failed: bool = False, open_id: int = 7) -> None:
        shipment = Shipment(open_id, "a", 0, GRANT, [], 0.0, 0.0, 0.0, num_writes=num_writes)
        self.closings.add(shipment, 100.0, "given up", clean=clean, has_failed=has_failed)


@pytest.mark.parametrize("first", [TransferState.DONE, TransferState.FAILED])
def test_an_end_is_clean_after_all_when_the_last_of_its_writes_is_done(first: TransferState) -> None:
    bench = Bench()
    bench.add(2)
    for open_id, state in ((8, TransferState.DONE), (7, first)):
        bench.closings.write_ended(open_id, state, 101.0)
    assert [(told.clean, told.reason) for told in bench.told] == [(False, "given up")]
    bench.closings.write_ended(7, TransferState.DONE, 102.0)
    is_clean = first is TransferState.DONE
    assert [told.clean for told in bench.told] == [False, *([True] if is_clean else [])]
    assert bench.closings.wants_new_agent(103.0) is not is_clean
    assert bench.closings.next_call_at(1.0) == (103.0 if is_clean else 101.0)


@pytest.mark.parametrize(
    ("num_writes", "has_failed", "after_s"),
    [(0, True, FAILED_AFTER_S), (1, True, STUCK_AFTER_S), (1, False, STUCK_AFTER_S)],
)
def test_our_agent_is_to_go_where_nothing_else_ends_what_it_does(
    num_writes: int, has_failed: bool, after_s: float
) -> None:
    bench, remote = Bench(), Bench(copies_itself=False)
    for each in (bench, remote):
        each.add(num_writes, has_failed=has_failed)
        each.add(0, clean=True, open_id=8)
    assert not bench.closings.wants_new_agent(100.0 + after_s - 0.1)
    assert bench.closings.wants_new_agent(100.0 + after_s)
    assert not remote.closings.wants_new_agent(100.0 + GIVE_UP_S)
    bench.told.clear()
    bench.closings.detached(100.0 + after_s)
    assert [(told.open_id, told.clean, told.detached) for told in bench.told] == [(7, False, True)]
    assert not bench.closings.wants_new_agent(100.0 + GIVE_UP_S)


def test_our_agents_keep_their_distance() -> None:
    bench = Bench()
    bench.closings.detached(98.0)
    bench.add(0, has_failed=True)
    assert not bench.closings.wants_new_agent(98.0 + MIN_INTERVAL_S - 0.1)
    assert bench.closings.wants_new_agent(98.0 + MIN_INTERVAL_S)


def test_what_only_the_end_of_our_agent_ends_is_not_given_up_before() -> None:
    bench = Bench()
    bench.add(1)
    bench.closings.repeat(100.0 + GIVE_UP_S, 1.0)
    assert bench.closings
    bench.closings.detached(100.0 + GIVE_UP_S)
    bench.closings.repeat(100.0 + GIVE_UP_S, 1.0)
    assert not bench.closings
