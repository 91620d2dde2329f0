"""What a worker computed itself is made thin where little is free, and is found, and read, as before."""

from __future__ import annotations

import msgspec

from kvferry.common.batch import BatchRow
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.decode.scheduler import DecodeScheduler
from kvferry.decode.sequence_blocks import SequenceBlocks
from kvferry.decode.thinning import Thinning
from kvferry.kvcache.blocks import BlockPool
from kvferry.kvcache.frame_pool import FramePool
from kvferry.kvcache.frames import frames_of
from kvferry.kvcache.prefix_cache import PrefixCache, PrefixHit
from kvferry.kvcache.thin import twin
from kvferry.kvcache.tiers import TierIndex

from .tagged import BLOCK
from .tagged import SPEC as PLAIN

SPEC = msgspec.structs.replace(PLAIN, num_layers=3, windows=(BLOCK, 0, BLOCK))
NUM_BLOCKS = 10


class Bench:
    """A sequence of eight blocks in a pool of ten, of which its windows reach the last ones."""

    def __init__(self) -> None:
        self.pool = FramePool(NUM_BLOCKS, BLOCK, frames_of(SPEC))
        self.blocks = SequenceBlocks(self.pool, SPEC, 8, PrefixCache(self.pool, spec=SPEC, host=TierIndex(1)))
        self.thinning = Thinning(self.pool, SPEC, self.blocks)
        self.seq = Sequence(RequestId("a"), 0, 0, list(range(8 * BLOCK)), 8 * BLOCK, SamplingParams())
        assert self.blocks.restore(self.seq, 0)
        self.blocks.begin([])
        self.blocks.end()
        self.blocks.count(self.seq, 8 * BLOCK - 1)
        self.whole = self.seq.block_table
        self.num_thin = SPEC.num_left_out(self.seq.num_computed_tokens)

    def step(self) -> list[tuple[int, int]]:
        """Begin and end a step; its copies."""
        copies = self.blocks._copies
        self.blocks._copies = []
        self.blocks._copying = [source for source, _ in copies]
        self.blocks.end()
        return copies


def test_blocks_behind_all_windows_lie_in_shares_and_their_frames_are_free_behind_the_step() -> None:
    bench = Bench()
    pool, seq, blocks = bench.pool, bench.seq, bench.blocks
    assert bench.num_thin == 5 and pool.num_free_blocks == 2
    bench.thinning.make_room([seq])
    assert not blocks._copies, "a fifth of the pool is free, and no more is kept so"
    others = pool.allocate(1)
    bench.thinning.make_room([seq])
    assert seq.num_thin_blocks == 2 and len(blocks._copies) == 1 and pool.num_free_blocks == 1
    assert seq.block_table is not bench.whole and seq.block_table[0] == bench.whole[0]
    assert [pool.is_thin(block) for block in seq.block_table] == 2 * [True] + 6 * [False]
    assert blocks._copies == [(bench.whole[1], seq.block_table[1])]
    assert bench.step() and pool.num_free_blocks == 2
    blocks.count(seq, 1)
    names = [twin(name) for name in seq.block_hashes[:2]] + seq.block_hashes[2:]
    assert pool.match_prefix(names) == seq.block_table and not pool.knows(seq.block_hashes[0])
    bench.thinning.make_room([seq])
    assert not blocks._copies, "enough is free"
    others += pool.allocate(2)
    bench.thinning.make_room([seq])
    assert seq.num_thin_blocks == bench.num_thin and bench.thinning.num_blocks == 5
    bench.step()
    assert pool.num_free_blocks == 2, "five thin ones take two frames"
    bench.thinning.make_room([seq])
    assert not blocks._copies, "windows reach the others"
    blocks.give_back(seq)
    pool.free(others)
    blocks.check()
    assert pool.num_free_blocks == NUM_BLOCKS


def test_what_waits_for_a_row_is_made_thin_as_well() -> None:
    pool = FramePool(NUM_BLOCKS, BLOCK, frames_of(SPEC))
    scheduler = DecodeScheduler(pool, SPEC, max_num_batched_tokens=16, max_num_seqs=1)
    for arrival, num_blocks in enumerate((1, 8)):
        length = num_blocks * BLOCK
        seq = Sequence(RequestId("a"), 0, 0, list(range(length)), length, SamplingParams(), arrival=arrival)
        seq.block_table, seq.num_computed_tokens = pool.allocate(num_blocks), length - 1
        scheduler.adopt(seq)
    scheduler.schedule()
    assert [seq.num_thin_blocks for seq in scheduler.queues.parked] == [2], "one frame more is free: a fifth of all"
    scheduler.check()


def test_a_sequence_that_ends_before_its_copies_gives_all_back() -> None:
    bench = Bench()
    taken = bench.pool.allocate(2)
    bench.thinning.make_room([bench.seq])
    assert bench.blocks._copies
    bench.blocks.give_back(bench.seq)
    assert not bench.blocks._copies and bench.pool.num_free_blocks == NUM_BLOCKS - 2
    bench.pool.free(taken)
    bench.blocks.check()


def test_a_step_copies_the_pages_that_thin_blocks_have() -> None:
    bench = Bench()
    bench.pool.allocate(2)
    bench.thinning.make_room([bench.seq])
    copies = list(bench.blocks._copies)
    batch = bench.blocks.begin([BatchRow(bench.seq, 1)])
    assert batch is not None and len(copies) > 1
    assert batch.block_copies == [(source, ~target) for source, target in copies]


def test_what_others_have_as_well_and_what_is_being_loaded_stays_whole() -> None:
    bench = Bench()
    shared = bench.seq.block_table[:3]
    bench.pool.pin(shared)
    taken = bench.pool.allocate(2)
    bench.thinning.make_room([bench.seq])
    assert bench.seq.block_table[:3] == shared and not any(bench.pool.is_thin(block) for block in shared)
    assert bench.pool.is_thin(bench.seq.block_table[3])
    bench.step()
    bench.blocks.evict(bench.seq)
    bench.blocks.begin([])
    bench.blocks.end()
    bench.pool.free(taken)
    bench.pool.free(shared)
    assert bench.blocks.restore(bench.seq, 0) and bench.blocks.is_loading(bench.seq)
    bench.pool.allocate(bench.pool.num_free_blocks)
    before = list(bench.seq.block_table)
    bench.thinning.make_room([bench.seq])
    assert bench.seq.block_table == before


def test_what_is_copied_in_from_host_memory_with_the_next_step_stays_whole() -> None:
    bench = Bench()
    name, host = b"n" * 16, bench.blocks.cache.host
    host.reserve(name)
    host.fill(name)
    bench.blocks.cache.promote(PrefixHit(promoted={0: name}), bench.seq.block_table)
    bench.pool.allocate(bench.pool.num_free_blocks)
    before = list(bench.seq.block_table)
    bench.thinning.make_room([bench.seq])
    assert bench.seq.block_table == before
    bench.blocks.cache.cancel(before)
    bench.thinning.make_room([bench.seq])
    assert bench.seq.block_table != before


def test_nothing_is_thin_where_no_layer_has_a_window() -> None:
    pool = BlockPool(4, BLOCK)
    blocks = SequenceBlocks(pool, PLAIN, 0)
    seq = Sequence(RequestId("a"), 0, 0, list(range(4 * BLOCK)), 4 * BLOCK, SamplingParams())
    assert blocks.restore(seq, 0)
    blocks.count(seq, 4 * BLOCK - 1)
    Thinning(pool, PLAIN, blocks).make_room([seq])
    assert seq.num_thin_blocks == 0 and not blocks._copies
