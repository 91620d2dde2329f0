"""Planted bugs of ranks that share out the heads of the KV: a handoff is one of pieces, each from a rank to a rank."""

from __future__ import annotations

from typing import Any

from kvferry.common.kv_spec import KVCacheSpec, Shard
from kvferry.transfer.backends.base import Piece
from kvferry.transfer.fetch.fetches import Fetches
from kvferry.transfer.fetch.ranks import RankReading
from kvferry.transfer.protocol import checksums, shards
from kvferry.transfer.protocol.checksums import ArrivalCheck, ShipmentSums
from kvferry.transfer.protocol.handoff import Verdict
from kvferry.transfer.protocol.rank_messages import ReadOutcome
from kvferry.transfer.receive.arrivals import Arrivals
from kvferry.transfer.receive.reservation import Writer
from kvferry.transfer.send.posting import Posting
from kvferry.transfer.send.ranks import RankShipping
from kvferry.worker import parts

from .planting import Planted

# --- handoffs -----------------------------------------------------------------------------------------------


def _arrive_with_first(self: Arrivals, reservation: Any, writer: Writer, pair: Any, message: Any) -> None:
    """A prompt has arrived when the first pair of ranks has told."""
    writer.arrived |= writer.expected
    _on_pair(self, reservation, writer, pair, message)


_on_pair = Arrivals._on_pair


def _at_own_offset(source: Shard, target: Shard, spec: KVCacheSpec) -> tuple[Piece, ...] | None:
    """A piece is written where it stands in the page of the rank that has it."""
    runs = _pieces(source, target, spec)
    return runs and tuple(Piece(run.local_offset, run.local_offset, run.num_bytes) for run in runs)


_pieces = shards.pieces


def _ended_with_as_many(self: Writer) -> bool:
    """As many source ranks must have ended as there are ranks that are written to."""
    return len(self.ended_ranks) >= min(self.tp_size, len({target for _, target in self.expected}))


def _one_cursor(self: Posting, shipment: Any, target: Any, end: int, now: float) -> None:
    """What was posted to one rank counts as posted to all."""
    _post_piece(self, shipment, target, end, now)
    for other in shipment.targets:
        other.num_posted = end


_post_piece = Posting._post_piece


def _free_with_first(self: RankShipping, open_id: int) -> None:
    """Source blocks are free when the first rank reads them no more."""
    is_first = open_id not in self._free_ranks._answers
    self._free_ranks.add(open_id, None)
    if is_first:
        self._on_source_free(open_id)


# --- checksums ----------------------------------------------------------------------------------------------


def _trust_others(self: ArrivalCheck, message: Any) -> Verdict:
    """Only what comes to the first heads is compared."""
    return _verdict(self, message) if self._shard.first_head == 0 else Verdict.INTACT


_verdict = ArrivalCheck.verdict


def _add_keys(self: ShipmentSums, pages: Any, ours: Any, theirs: Any, shipped: tuple[Piece, ...]) -> None:
    """Of heads that are shipped the keys are summed ..."""
    _add(self, pages, ours, theirs, shipped[:1])


_add = ShipmentSums.add


def _keys(source: Shard, target: Shard, spec: KVCacheSpec) -> tuple[Piece, ...] | None:
    """... and on the other side, too."""
    runs = _pieces(source, target, spec)
    return runs and runs[:1]


# --- fetches ------------------------------------------------------------------------------------------------


def _read_first_heads(
    self: RankReading, fetch_id: int, kv_address: str, ranks: Any, ours: Any, theirs: Any, num_thin: int, has_sums: bool
) -> None:
    """Every rank reads from rank 0."""
    _read(self, fetch_id, kv_address, (ranks[0],) * len(ranks), ours, theirs, num_thin, has_sums)


_read = RankReading.read


class _DoneWithFirst(Fetches):
    """A part is here when one rank has read its heads."""

    def on_read(self, rank: int, fetch_id: int, outcome: ReadOutcome, sums: bytes) -> None:
        fetch = self._parts.get(fetch_id)
        if outcome is ReadOutcome.DONE and fetch is not None and fetch.part is not None:
            fetch.part.waits_for = {rank}
        super().on_read(rank, fetch_id, outcome, sums)


BUGS = (
    Planted("a prompt arrives with its first piece", frozenset({"H11"}), ((Arrivals, "_on_pair", _arrive_with_first),)),
    Planted("a piece lands at its own offset", frozenset({"H10"}), ((shards, "pieces", _at_own_offset),)),
    Planted(
        "as many source ranks end a write as there are targets",
        frozenset({"H1"}),
        ((Writer, "has_ended", property(_ended_with_as_many)),),
        within_seeds=200,
    ),
    Planted("ranks share a cursor", frozenset({"H2"}), ((Posting, "_post_piece", _one_cursor),)),
    Planted(
        "source blocks are free with the first rank",
        frozenset({"H2"}),
        ((RankShipping, "on_rank_free", _free_with_first),),
        within_seeds=200,
    ),
    Planted(
        "the first heads are compared alone",
        frozenset({"H2"}),
        ((ArrivalCheck, "verdict", _trust_others),),
        within_seeds=400,
    ),
    Planted(
        "values are not summed",
        frozenset({"H2"}),
        ((ShipmentSums, "add", _add_keys), (checksums, "pieces", _keys)),
        within_seeds=400,
    ),
    Planted(
        "every rank fetches the first heads",
        frozenset({"H10"}),
        ((RankReading, "read", _read_first_heads),),
        within_seeds=200,
    ),
    Planted(
        "a fetch is done with its first rank",
        frozenset({"F1", "F2", "H2"}),
        ((parts, "Fetches", _DoneWithFirst),),
        within_seeds=200,
    ),
)
