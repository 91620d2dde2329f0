"""A decode worker is told how a shipment ended until it has heard it, however long it was away."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvferry.tests.decode.bench import REGION, SPEC
from kvferry.transfer.send.closings import FAILED_AFTER_S, GIVE_UP_S, Closings
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
    closings = Closings(0, lambda address, message: None, copies_itself=True)
    closings.add(Shipment(7, "a", 0, GRANT, [], 0.0, 0.0, 0.0), 0.0, "it failed", clean=True)
    closings.repeat(GIVE_UP_S, 1.0)
    assert not closings
