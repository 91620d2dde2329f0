"""Fetches and lending seen from rank 0: every call reaches the reader, or the sums, of every rank.

    Fetches ─> RankReading ──> our TransferThread ──> our KVReader          Lending ─> RankSumming ──> our BlockSums
                   └─(bytes)──> follower: `apply_read` ──> its KVReader                    └─(bytes)──> its BlockSums

Block ids are rank 0's decision and the same on all ranks; each rank reads its own heads, from the rank that has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ...common.messages import RegionInfo, encode
from ...common.request import BlockId
from ..protocol.rank_messages import GiveUpRead, ReadBlocks, SumBlocks
from .reader import BlockSums, KVReader


class Calls(Protocol):
    """The transfer thread, as far as it is needed here."""

    def call(self, function: Callable[..., None], *args: object) -> None:
        """Run `function(*args)` on the transfer thread, in order."""
        ...


def apply_read(command: ReadBlocks | GiveUpRead, thread: Calls, reader: KVReader) -> None:
    """Carry out a command on this rank."""
    if isinstance(command, GiveUpRead):
        thread.call(reader.give_up, command.fetch_id)
        return
    ours, theirs = command.ours, command.theirs
    thread.call(reader.begin, command.fetch_id, command.kv_address, command.ranks, ours, theirs, command.wants_sums)


class RankReading:
    """Implements `fetches.Reading` on rank 0. `broadcast` reaches the followers; None without any."""

    def __init__(self, thread: Calls, reader: KVReader, broadcast: Callable[[bytes], None] | None) -> None:
        self._thread = thread
        self._reader = reader
        self._broadcast = broadcast

    def read(
        self,
        fetch_id: int,
        kv_address: str,
        ranks: tuple[RegionInfo, ...],
        ours: tuple[BlockId, ...],
        theirs: tuple[BlockId, ...],
        wants_sums: bool,
    ) -> None:
        self._tell(
            ReadBlocks(
                fetch_id=fetch_id, kv_address=kv_address, ranks=ranks, ours=ours, theirs=theirs, wants_sums=wants_sums
            )
        )

    def give_up(self, fetch_id: int) -> None:
        self._tell(GiveUpRead(fetch_id=fetch_id))

    def _tell(self, command: ReadBlocks | GiveUpRead) -> None:
        if self._broadcast is not None:
            self._broadcast(encode(command))
        apply_read(command, self._thread, self._reader)


class RankSumming:
    """Makes the checksums of lent blocks on all ranks; ours are told to `done(rank, fetch_id, checksum)`."""

    def __init__(
        self,
        thread: Calls,
        sums: BlockSums,
        broadcast: Callable[[bytes], None] | None,
        done: Callable[[int, int, bytes], None],
    ) -> None:
        """`done` is called on the transfer thread."""
        self._thread = thread
        self._sums = sums
        self._broadcast = broadcast
        self._done = done

    def start(self, fetch_id: int, blocks: tuple[BlockId, ...]) -> None:
        if self._broadcast is not None:
            self._broadcast(encode(SumBlocks(fetch_id=fetch_id, blocks=blocks)))
        self._thread.call(self._sum, fetch_id, blocks)

    def _sum(self, fetch_id: int, blocks: tuple[BlockId, ...]) -> None:
        self._done(0, fetch_id, self._sums.make(blocks))
