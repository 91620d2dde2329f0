"""What reaches the senders of all ranks: blocks in which order, calls in which lane, and when the last rank is done."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvferry.common.batch import GpuEvent
from kvferry.transfer.send.plan import ShipPlan
from kvferry.transfer.send.ranks import SENDING, RankShipping, _Blocks
from kvferry.wire.handoff import KVDone

from ..protocol.test_rank_calls import GRANT, SPEC
from .test_layer_shipper import _sender


def test_blocks_go_in_the_order_of_ours_each_with_its_target() -> None:
    blocks = _Blocks.from_plan(ShipPlan(7, (9, 8, 2, 5), (30, 29, 1, 12), last=True))
    assert (blocks.open_id, blocks.last) == (7, True)
    assert blocks.local.tolist() == [2, 5, 8, 9] and blocks.remote.tolist() == [1, 12, 29, 30]
    assert blocks.local.dtype == blocks.remote.dtype == np.int32


class _Lanes:
    """A transfer thread that notes what it is asked for, and in which lane."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.behind_pages: list[str] = []

    def call(self, function: Callable[..., None], *args: object) -> None:
        self.calls.append(function.__name__)

    def call_after(self, event: GpuEvent | None, function: Callable[..., None], *args: object) -> None:
        self.behind_pages.append(function.__name__)


def test_every_rank_hears_of_a_shipment_and_of_its_end_behind_its_pages() -> None:
    lanes, payloads, freed = _Lanes(), list[bytes](), list[int]()
    shipping = RankShipping(
        lanes,
        _sender(),
        spec=SPEC,
        tp_size=2,
        broadcast=payloads.append,
        layer_event=lambda: None,
        on_source_free=freed.append,
    )
    open_id = shipping.open("r", 1, GRANT)
    assert 2**32 < open_id < 2**63
    plans = [ShipPlan(open_id, (4,), (1,), last=True)]
    shipping.begin_step(plans)
    for layer in range(SPEC.num_layers):
        shipping.on_layer(layer)
    shipping.finish(open_id, (), 16)
    shipping.cancel(open_id, "aborted")
    shipping.on_answer(done := KVDone(grant_id=GRANT.grant_id, open_id=open_id))
    shipping.on_peer_lost("127.0.0.1:1")
    assert lanes.calls == ["open", "cancel", "on_message", "on_peer_lost"]
    assert lanes.behind_pages == ["pages_ready"] * SPEC.num_layers + ["layers_done", "finish"]
    assert [SENDING.decode(payload) for payload in payloads] == [
        ("open", (open_id, "r", 1, GRANT)),
        ("begin_step", (plans,)),
        ("finish", (open_id, (), 16)),
        ("cancel", (open_id, "aborted")),
        ("on_message", (done,)),
        ("on_peer_lost", ("127.0.0.1:1",)),
    ]
    shipping.on_rank_free(open_id)
    assert not freed
    shipping.on_rank_free(open_id)
    assert freed == [open_id]
