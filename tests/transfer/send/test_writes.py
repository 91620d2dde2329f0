"""Writes are counted against their shipment and its decode worker until they end, or nobody waits for them."""

from __future__ import annotations

import torch

from kvferry.transfer.backends.base import Piece, TransferState
from kvferry.transfer.backends.local import LocalBackend, LocalFault, LocalNetwork
from kvferry.transfer.backends.peers import Peers
from kvferry.transfer.send.shipment import Shipment, Target
from kvferry.transfer.send.writes import Writes

from .test_closings import GRANT

PEER = ("d", 1)


class Bench:
    """Writes to one agent, of which so many pages may be under way."""

    def __init__(self, max_pages: int) -> None:
        self.network = LocalNetwork()
        theirs, ours = LocalBackend("d.1.0.0", self.network), LocalBackend("p.1.0.0", self.network)
        pages = torch.zeros(1, 4, 2, 1, 4, 2)
        ours.register(pages.clone(), rank=0, tp_size=1, generation=0)
        region = theirs.register(pages, rank=0, tp_size=1, generation=0)
        self.page_bytes = region.page_bytes
        self.target = Target(region, (Piece(0, 0, region.page_bytes),))
        self.writes = Writes(ours, Peers(ours), max_pages * region.page_bytes)
        self.writes.connect(GRANT.kv_address, self.target)

    def post(self, shipment: Shipment, now: float, *, is_held: bool) -> None:
        if is_held:
            self.network.set_fault("d.1.0.0", LocalFault.HOLD)
        self.writes.post(shipment, self.target, [0], [1], now)
        self.network._faults.clear()  # what is held stays so

    def poll(self, now: float) -> list[TransferState]:
        return [state for _, state in self.writes.poll(now)]


def _shipment(open_id: int) -> Shipment:
    return Shipment(open_id, "a", 0, GRANT, [], 0.0, 0.0, 0.0)


def test_what_nobody_waits_for_any_more_is_on_nobodys_account() -> None:
    bench, one, other = Bench(max_pages=2), _shipment(1), _shipment(2)
    for shipment in (one, other):
        bench.post(shipment, 100.0, is_held=True)
    assert not bench.writes.has_room(PEER, 1)
    for _ in range(2):
        bench.writes.disown(one)
        assert (one.num_writes, other.num_writes) == (0, 1)
        assert bench.writes.has_room(PEER, bench.page_bytes) and not bench.writes.has_room(PEER, bench.page_bytes + 1)
    bench.network.clear_fault("d.1.0.0")
    assert bench.poll(101.0) == [TransferState.DONE] * 2 and not bench.writes
    assert (one.num_writes, other.num_writes) == (0, 0)
    assert bench.writes.has_room(PEER, 9 * bench.page_bytes), "one write always may"
    assert not bench.writes._in_flight_bytes, "nothing is kept of a worker that is not written to"


def test_a_write_stands_since_its_post_or_since_its_link_moved_last() -> None:
    bench, shipment = Bench(max_pages=9), _shipment(1)
    bench.post(shipment, 100.0, is_held=True)
    bench.post(shipment, 100.5, is_held=False)
    found = list(bench.writes.poll(101.0))
    assert [state for _, state in found] == [TransferState.PENDING, TransferState.DONE]
    assert bench.writes.stands_since(found[0][0]) == 101.0
    bench.post(shipment, 102.0, is_held=True)
    assert [bench.writes.stands_since(write) for write, _ in bench.writes.poll(103.0)] == [101.0, 102.0]
