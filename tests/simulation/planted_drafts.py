"""Planted bugs of drafts: what is wrong in a draft must leave no trace."""

from __future__ import annotations

from collections.abc import Iterable

from kvferry.common.batch import BatchRow, GpuEvent, RowKind, RowOutput, verified_output
from kvferry.common.request import SampledToken, Sequence
from kvferry.decode import role as decode_role
from kvferry.decode import speculation
from kvferry.decode.draft_spans import DraftSpans
from kvferry.decode.scheduler import DecodeScheduler
from kvferry.transfer.send.ranks import LayerShipper, _Blocks

from . import engine
from .planting import Planted
from .scenario import SPEC


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


class _KeepsRejected(DraftSpans):
    """What a draft model was fed counts for good: rejected tokens, and what a preemption has taken, too."""

    def assign(self, rows: Iterable[BatchRow]) -> None:
        computed, rows = dict(self._computed), list(rows)
        super().assign(rows)
        self._computed |= computed


class _OnlyDrafts(DraftSpans):
    """A draft model computes nothing but what it drafts from."""

    def assign(self, rows: Iterable[BatchRow]) -> None:
        rows = list(rows)
        super().assign(rows)
        for row in rows:
            assert row.draft_span is not None
            if row.kind is not RowKind.CHUNK:
                row.draft_span = (row.draft_span[0], row.end - 1) if row.draft else (row.end, row.end)


def _ship_too_early(self: LayerShipper, blocks: _Blocks, layer: int, event: GpuEvent | None) -> None:
    """A draft model's layers leave with its target's first one."""
    if layer < SPEC.num_layers:
        _ready(self, blocks, layer, event)
    if layer == 0 and self._spec.num_layers > SPEC.num_layers:
        _ready(self, blocks, SPEC.num_layers, event)


_ready = LayerShipper._ready

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
    Planted(
        "a draft model keeps what was rejected",
        frozenset({"H2", "F2"}),
        ((speculation, "DraftSpans", _KeepsRejected),),
    ),
    Planted(
        "a draft model leaves full blocks incomplete",
        frozenset({"H2", "F2"}),
        ((speculation, "DraftSpans", _OnlyDrafts),),
    ),
    Planted(
        "a draft model's layers are shipped too early",
        frozenset({"H2", "F2"}),
        ((LayerShipper, "_ready", _ship_too_early),),
    ),
)
