"""In which order blocks are told to the sender."""

from __future__ import annotations

import numpy as np

from kvferry.transfer.send.plan import ShipPlan
from kvferry.transfer.send.ranks import _Blocks


def test_blocks_go_in_the_order_of_ours_each_with_its_target() -> None:
    blocks = _Blocks.from_plan(ShipPlan(7, (9, 8, 2, 5), (30, 29, 1, 12), last=True))
    assert (blocks.open_id, blocks.last) == (7, True)
    assert blocks.local.tolist() == [2, 5, 8, 9] and blocks.remote.tolist() == [1, 12, 29, 30]
    assert blocks.local.dtype == np.int32
