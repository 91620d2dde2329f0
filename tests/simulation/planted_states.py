"""Planted bugs that keys and values forgive and states do not: a token that is computed again is in a state twice."""

from __future__ import annotations

from kvferry.common.request import Sequence
from kvferry.kvcache.swap import SwapSpace

from .planting import Planted


def _one_less(self: SwapSpace, seq: Sequence) -> int:
    """The last token that was computed before its blocks left the device counts as not computed."""
    return max(0, _num_saved_tokens(self, seq) - 1)


_num_saved_tokens = SwapSpace.num_saved_tokens

BUGS = (
    Planted(
        "a swapped sequence computes its last token again",
        frozenset({"H2"}),
        ((SwapSpace, "num_saved_tokens", _one_less),),
        within_seeds=200,
    ),
)
