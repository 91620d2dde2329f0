"""Fetches and lending on all ranks: each reads its own heads, from the rank that has them, and sums its own pages.

    Fetches ─> RankReading ─> each(reader.begin)          Lending ─> each(summing.sum_blocks)

Block ids are rank 0's decision and the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ...common.request import BlockId
from ...wire.fields import BlockIds
from ...wire.grants import RegionInfo
from ..protocol.rank_calls import Each
from .reader import BlockSums, KVReader


class Reading(Protocol):
    """The readers of all ranks."""

    def read(
        self,
        fetch_id: int,
        kv_address: str,
        ranks: tuple[RegionInfo, ...],
        ours: tuple[BlockId, ...],
        theirs: tuple[BlockId, ...],
        num_thin: int,
        wants_sums: bool,
    ) -> None:
        """Each rank reads from the one with its number; answered by `Fetches.on_read` of each."""
        ...

    def give_up(self, fetch_id: int) -> None:
        """Every rank that is not done answers, in time, that it is over."""
        ...


class RankReading:
    """Implements `Reading` on rank 0."""

    def __init__(self, each: Each, reader: KVReader) -> None:
        self._each = each
        self._reader = reader

    def read(
        self,
        fetch_id: int,
        kv_address: str,
        ranks: tuple[RegionInfo, ...],
        ours: tuple[BlockId, ...],
        theirs: tuple[BlockId, ...],
        num_thin: int,
        wants_sums: bool,
    ) -> None:
        self._each(self._reader.begin, fetch_id, kv_address, ranks, ours, theirs, num_thin, wants_sums)

    def give_up(self, fetch_id: int) -> None:
        self._each(self._reader.give_up, fetch_id)


class RankSumming:
    """Makes the checksums of lent blocks on one rank, and tells them to `done(rank, fetch_id, checksum)`."""

    def __init__(self, rank: int, sums: BlockSums | None, done: Callable[[int, int, bytes], None]) -> None:
        """`sums`: None where no checksums are made. `done` is called on the transfer thread."""
        self._rank = rank
        self._sums = sums
        self._done = done

    def sum_blocks(self, fetch_id: int, blocks: BlockIds, num_thin: int) -> None:
        assert self._sums is not None, "rank 0 makes checksums where all do"
        self._done(self._rank, fetch_id, self._sums.make(blocks, num_thin))
