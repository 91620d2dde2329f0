"""Which shipments a KVRenew names, and when it is sent."""

from __future__ import annotations

import msgspec

from kvferry.transfer.send.leases import Leases
from kvferry.transfer.send.shipment import Shipment, ShipmentState
from kvferry.wire.fields import Message
from kvferry.wire.grants import GrantId
from kvferry.wire.handoff import KVRenew

from .test_closings import GRANT


def _shipment(open_id: int, worker_id: str = "d", state: ShipmentState = ShipmentState.SHIPPING) -> Shipment:
    grant = msgspec.structs.replace(GRANT, grant_id=GrantId(worker_id, 1, open_id), kv_address=f"{worker_id}:1")
    return Shipment(open_id, "a", 0, grant, [], 0.0, 2.85, 0.0, state)


class Bench:
    """The leases of one rank, which asks every second, and what it has asked."""

    def __init__(self, *shipments: Shipment, rank: int = 0) -> None:
        self.shipments = shipments
        self.asked: list[tuple[str, list[int]]] = []
        self.leases = Leases(rank, 1.0, self._to_peer)
        for shipment in shipments:
            self.leases.add(shipment, 0.0)

    def _to_peer(self, kv_address: str, message: Message) -> None:
        assert isinstance(message, KVRenew)
        self.asked.append((kv_address, [open_id for _, open_id in message.opens]))

    def asks(self, now: float) -> list[tuple[str, list[int]]]:
        self.asked.clear()
        self.leases.renew(self.shipments, now)
        return list(self.asked)


def test_each_worker_is_asked_for_what_may_be_written_there() -> None:
    bench = Bench(
        _shipment(1),
        _shipment(2, "e"),
        _shipment(3, state=ShipmentState.TOLD),
        _shipment(4, state=ShipmentState.OPENING),
    )
    assert bench.asks(0.9) == []
    assert bench.asks(1.0) == [("d:1", [1, 3]), ("e:1", [2])]


def test_a_worker_that_has_answered_is_asked_again_when_its_time_has_come() -> None:
    bench = Bench(_shipment(1))
    assert bench.asks(1.0) and bench.leases.next_times() == [] and not bench.asks(2.5)
    bench.leases.answered(("d", 1))
    assert bench.leases.next_times() == [2.0] and not bench.asks(1.9)
    assert bench.asks(2.0)


def test_no_answer_comes_over_a_link_that_has_broken() -> None:
    bench = Bench(_shipment(1, state=ShipmentState.TOLD), _shipment(2, "e"))
    assert len(bench.asks(1.0)) == 2
    bench.leases.peer_lost("d:1")
    assert bench.asks(2.0) == [("d:1", [1])]
    bench.leases.answered(("d", 1))
    assert bench.leases.next_times() == [3.0]


def test_other_ranks_ask_nobody_and_wait_for_no_time() -> None:
    bench = Bench(_shipment(1), rank=1)
    assert bench.asks(1.0) == [] and bench.leases.next_times() == []
