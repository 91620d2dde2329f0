"""Planted bugs of drafts: what is wrong in a draft must leave no trace."""

from __future__ import annotations

from kvferry.common.batch import BatchRow, RowOutput, verified_output
from kvferry.common.request import SampledToken, Sequence
from kvferry.decode import role as decode_role
from kvferry.decode.scheduler import DecodeScheduler

from . import engine
from .planting import Planted


def _accept_one_more(row: BatchRow, tokens: list[tuple[SampledToken, ...]]) -> RowOutput:
    """What was drawn after the first wrong token counts, too."""
    right = verified_output(row, tokens).runs[0]
    return RowOutput((tuple(drawn[0] for drawn in tokens[: len(right) + 1]),))


def _accept_all(row: BatchRow, tokens: list[tuple[SampledToken, ...]]) -> RowOutput:
    """The draft itself is what was said."""
    said = [SampledToken(token) for token in row.draft]
    return RowOutput(((*said, tokens[-1][0]),))


class _CountsDrafts(DecodeScheduler):
    """Every fed token counts as computed, those that were rejected as well."""

    def accept(self, seq: Sequence, num_tokens: int) -> None:
        room = len(seq.block_table) * self._pool.block_size - seq.num_computed_tokens
        super().accept(seq, min(num_tokens + 1, seq.num_uncomputed_tokens, room))


def _all_there_is(self: DecodeScheduler, seq: Sequence, num_tokens: int) -> int:
    """A draft is fed whether its sequence has blocks for it or not."""
    return num_tokens


BUGS = (
    Planted(
        "a wrong draft is believed",
        frozenset({"I6"}),
        ((engine, "verified_output", _accept_all),),
    ),
    Planted(
        "the accept rule is off by one",
        frozenset({"I6"}),
        ((engine, "verified_output", _accept_one_more),),
    ),
    Planted(
        "rejected tokens count as computed",
        frozenset({"I6", "I16", "H2", "F2"}),
        ((decode_role, "DecodeScheduler", _CountsDrafts),),
    ),
    Planted(
        "a draft has no blocks",
        frozenset({"I2", "I3", "crash"}),
        ((DecodeScheduler, "room_for", _all_there_is),),
    ),
)
