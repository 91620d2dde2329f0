"""A part is read on all ranks: it is here when the last one has it, and over when the last one says so."""

from __future__ import annotations

import msgspec
import pytest

from kvferry.common.request import BlockId
from kvferry.kvcache.blocks import BlockPool
from kvferry.kvcache.thin import thin_rule
from kvferry.tests.fake_clock import FakeClock
from kvferry.transfer.fetch.fetch import FetchFailure
from kvferry.transfer.fetch.fetches import Fetches
from kvferry.transfer.protocol.handoff import Endpoint
from kvferry.transfer.protocol.rank_messages import ReadOutcome
from kvferry.wire.fetches import KVFetch, KVFetchable, KVFetchDone, KVFetchSums
from kvferry.wire.fields import Message
from kvferry.wire.grants import RegionInfo
from kvferry.wire.tasks import FetchFrom

from .fetch_hosts import ADDRESS, HASHES, LEASE_S, SPEC, Pair

HEADS = msgspec.structs.replace(SPEC, num_kv_heads=2)
DONE, FAILED, OVER = ReadOutcome.DONE, ReadOutcome.FAILED, ReadOutcome.OVER


class Ranks:
    """Implements `Reading` for two ranks, and is the lender of two blocks; what either side says is said by hand."""

    def __init__(self, *, checksums: bool = False) -> None:
        region = Pair().lender.region
        self.regions = tuple(msgspec.structs.replace(region, rank=rank, tp_size=2) for rank in range(2))
        self.pool = BlockPool(8, HEADS.block_size)
        self.asked: list[Message] = []
        self.given_up: list[int] = []
        self.ended: list[str] = []
        self.fetches = Fetches(
            pool=self.pool,
            endpoint=Endpoint(HEADS, "1", "local", 2),
            clock=FakeClock(),
            reading=self,
            to_peer=lambda address, message: self.asked.append(message),
            has_checksums=checksums,
        )
        source = FetchFrom(worker_id="lender", kv_address=ADDRESS, num_tokens=2 * HEADS.block_size, within_s=9.0)
        self.fetches.begin("q", HASHES[:2], source, thin_rule(HEADS), lambda: self.ended.append("q"))
        question = self.asked.pop()
        assert isinstance(question, KVFetch)
        self.fetch_id = question.fetch_id
        self.fetches.on_message(
            KVFetchable(
                fetch_id=self.fetch_id,
                lease_s=LEASE_S,
                block_ids=(3, 1),
                ranks=self.regions,
                has_checksums=checksums,
            )
        )

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
        assert (fetch_id, kv_address, ranks, theirs) == (self.fetch_id, ADDRESS, self.regions, (3, 1))
        assert len(ours) == self.pool.num_owned_blocks == 2

    def give_up(self, fetch_id: int) -> None:
        self.given_up.append(fetch_id)

    def on_read(self, rank: int, outcome: ReadOutcome, sums: bytes = b"") -> None:
        self.fetches.on_read(rank, self.fetch_id, outcome, sums)
        self.fetches.check()

    @property
    def num_found(self) -> int:
        return len(self.pool.match_prefix(HASHES[:2]))


def test_a_part_is_here_when_every_rank_has_read_it() -> None:
    ranks = Ranks()
    ranks.on_read(1, DONE)
    assert (ranks.ended, ranks.num_found) == ([], 0)
    ranks.on_read(0, DONE)
    assert ranks.ended == ["q"] and ranks.num_found == 2 and not ranks.pool.num_owned_blocks
    assert ranks.fetches.num_bytes == 2 * 2 * SPEC.block_bytes() and not ranks.given_up
    assert ranks.asked == [KVFetchDone(fetch_id=ranks.fetch_id)]


@pytest.mark.parametrize("words", [[(0, OVER), (1, OVER)], [(1, DONE), (0, OVER)], [(1, FAILED), (1, OVER), (0, OVER)]])
def test_blocks_of_a_part_that_failed_are_free_after_the_last_ranks_last_word(
    words: list[tuple[int, ReadOutcome]],
) -> None:
    ranks = Ranks()
    ranks.on_read(0, FAILED)
    assert ranks.ended == ["q"] and ranks.fetches.failures == {FetchFailure.READ_FAILED: 1}
    assert ranks.given_up == [ranks.fetch_id]
    for rank, outcome in words:
        assert ranks.pool.num_owned_blocks == ranks.fetches.given_up.num_blocks == 2
        ranks.on_read(rank, outcome)
    assert not ranks.pool.num_owned_blocks and not len(ranks.fetches) and not ranks.num_found


def test_a_rank_that_was_done_before_the_part_failed_is_not_waited_for() -> None:
    ranks = Ranks()
    ranks.on_read(0, DONE)
    ranks.on_read(1, FAILED)
    assert ranks.pool.num_owned_blocks == 2
    ranks.on_read(1, OVER)
    assert not ranks.pool.num_owned_blocks and not ranks.num_found


@pytest.mark.parametrize("is_first", [False, True])
def test_the_sums_of_every_rank_are_waited_for(is_first: bool) -> None:
    """They may be here before the bytes are."""
    ranks = Ranks(checksums=True)
    theirs = [KVFetchSums(fetch_id=ranks.fetch_id, rank=rank, checksum=b"%d" % rank) for rank in range(2)]
    if is_first:
        ranks.fetches.on_message(theirs.pop())
    ranks.on_read(0, DONE, b"0")
    ranks.on_read(1, DONE, b"1")
    for message in theirs:
        assert not ranks.ended and not ranks.num_found
        ranks.fetches.on_message(message)
    assert ranks.ended == ["q"] and ranks.num_found == 2


def test_sums_of_another_rank_do_not_fit() -> None:
    ranks = Ranks(checksums=True)
    for rank in range(2):
        ranks.on_read(rank, DONE, b"%d" % rank)
        ranks.fetches.on_message(KVFetchSums(fetch_id=ranks.fetch_id, rank=rank, checksum=b"%d" % (1 - rank)))
    assert ranks.fetches.failures == {FetchFailure.OTHER_SUMS: 1} and not ranks.num_found
    assert not ranks.pool.num_owned_blocks
