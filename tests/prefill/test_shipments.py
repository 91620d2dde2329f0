"""Whose shipment has ended is known by its open: one attempt may have two of them under way."""

from __future__ import annotations

from kvferry.common.request import RequestSpec, SamplingParams
from kvferry.kvcache.blocks import BlockPool
from kvferry.prefill.shipments import Shipments


def test_the_end_of_one_of_an_attempts_opens_leaves_the_other() -> None:
    cancelled = list[int]()
    shipments = Shipments(BlockPool(4, 4), lambda open_id, reason: cancelled.append(open_id))
    spec = RequestSpec(request_id="a", attempt=0, prompt=b"\0" * 16, sampling=SamplingParams())
    shipments.opened(1, "R", spec)
    shipments.opened(2, "S", spec)
    assert shipments.ended(2) == "S" and shipments.ended(2) is None
    assert shipments.routers == {"R"} and len(shipments) == 2, "the blocks of both are read"
    shipments.cancel("a", 0, "aborted")
    assert cancelled == [1]
    assert shipments.ended(1) == "R" and not shipments.routers
    for open_id in (1, 2):
        shipments.source_free(open_id)
    assert not len(shipments)
