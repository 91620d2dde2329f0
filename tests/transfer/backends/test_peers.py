"""Connections to agents that were replaced go when nobody needs them any more."""

from __future__ import annotations

import torch

from kvferry.transfer.backends.base import Piece
from kvferry.transfer.backends.local import LocalBackend, LocalNetwork
from kvferry.transfer.backends.peers import Peers
from kvferry.wire.grants import RegionInfo


class Bench:
    """One agent of ours, and one rank of one decode worker."""

    def __init__(self) -> None:
        network = LocalNetwork()
        self.needed: set[str] = set()
        self.ours = LocalBackend("p-0.1.0.0", network)
        self.theirs, self.other = LocalBackend("d-0.1.0.0", network), LocalBackend("d-0.1.0.1", network)
        pages = torch.zeros(1, 2, 2, 1, 1, 1)
        self.ours.register(pages, rank=0, tp_size=1, generation=0)
        self.regions = [
            backend.register(pages, rank=rank, tp_size=2, generation=0)
            for rank, backend in enumerate((self.theirs, self.other))
        ]
        self.peers = Peers(self.ours)
        self.peers.needs(lambda: self.needed)

    def connect(self, region: RegionInfo) -> None:
        self.peers.connect("127.0.0.1:1", region, (Piece(0, 0, region.page_bytes),))
        self.peers.forget_lost()

    @property
    def connected(self) -> set[str]:
        return set(self.ours._pieces)


def test_one_agent_of_each_rank_is_kept_however_often_they_are_replaced() -> None:
    bench = Bench()
    for region in bench.regions:
        bench.connect(region)
    for generation in range(1, 12):
        bench.connect(bench.theirs.rotate(generation))
    assert bench.connected == {"d-0.1.11.0", "d-0.1.0.1"}


def test_an_agent_that_was_replaced_is_kept_while_a_write_to_it_is_under_way() -> None:
    bench = Bench()
    bench.connect(bench.regions[0])
    bench.needed = {"d-0.1.0.0"}
    bench.connect(bench.theirs.rotate(1))
    assert bench.connected == {"d-0.1.0.0", "d-0.1.1.0"}
    bench.needed = set()
    bench.peers.forget_lost()
    assert bench.connected == {"d-0.1.1.0"}
