"""Planted bugs that keys and values forgive and states do not: a token is in a state twice, or is not in it."""

from __future__ import annotations

from kvferry.common.request import Sequence
from kvferry.decode.scheduler import DecodeScheduler
from kvferry.kvcache.swap import SwapSpace

from .planting import Planted


def _one_less(self: SwapSpace, seq: Sequence) -> int:
    """The last token that was computed before its blocks left the device counts as not computed."""
    return max(0, _num_saved_tokens(self, seq) - 1)


def _accept(self: DecodeScheduler, seq: Sequence, num_tokens: int) -> None:
    """Tokens of a right draft count as computed whatever the model."""
    self.blocks.count(seq, num_tokens)


_num_saved_tokens = SwapSpace.num_saved_tokens

BUGS = (
    Planted(
        "a swapped sequence computes its last token again",
        frozenset({"H2"}),
        ((SwapSpace, "num_saved_tokens", _one_less),),
        within_seeds=200,
    ),
    Planted(
        "a state is taken to be behind a draft that was right",
        frozenset({"H2"}),
        ((DecodeScheduler, "accept", _accept),),
        within_seeds=200,
    ),
)
