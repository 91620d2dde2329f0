"""Blocks of sequences at the edges of a step: shared, copied, taken twice."""

from __future__ import annotations

import msgspec
import pytest

from kvferry.common.batch import BatchRow
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.decode.sequence_blocks import SequenceBlocks
from kvferry.kvcache.blocks import BlockPool, hash_blocks, prefix_salt
from kvferry.kvcache.frame_pool import FramePool
from kvferry.kvcache.frames import frames_of
from kvferry.kvcache.prefix_cache import PrefixCache
from kvferry.kvcache.tiers import TierIndex

from .tagged import BLOCK, SPEC


def _blocks(num_blocks: int, num_swap_blocks: int) -> tuple[SequenceBlocks, BlockPool]:
    pool = BlockPool(num_blocks, BLOCK)
    return SequenceBlocks(pool, SPEC, num_swap_blocks), pool


def _computed(blocks: SequenceBlocks, name: str, num_tokens: int, first: int = 0) -> Sequence:
    """With KV for all tokens but the last."""
    seq = Sequence(RequestId(name), 0, 0, list(range(first, first + num_tokens)), num_tokens, SamplingParams())
    assert blocks.restore(seq, 0)
    seq.num_computed_tokens = num_tokens - 1
    blocks.known.publish(seq)
    return seq


def test_blocks_that_go_out_are_the_pools_only_after_the_step() -> None:
    blocks, pool = _blocks(4, 4)
    seq = _computed(blocks, "a", 9)
    blocks.evict(seq)
    assert pool.num_free_blocks == 2, "the block without KV is free at once"
    assert blocks.num_available == 4
    batch = blocks.begin([])
    assert batch is not None and len(batch.swap_out) == 2 and blocks.begin([]) is None
    assert pool.num_free_blocks == 2
    blocks.end()
    assert pool.num_free_blocks == 4
    blocks.check()


def test_a_block_that_goes_out_and_was_given_on_stays_out_of_the_pool_if_its_new_owner_ends_at_once() -> None:
    blocks, pool = _blocks(2, 4)
    first = _computed(blocks, "a", 8)
    blocks.evict(first)
    second = Sequence(RequestId("b"), 0, 0, list(range(50, 57)), 7, SamplingParams())
    assert blocks.restore(second, 0)
    blocks.give_back(second)
    assert pool.num_free_blocks == 0, "both are read until the step ends"
    assert blocks.begin([]) is not None
    blocks.end()
    assert pool.num_free_blocks == 2
    blocks.check()


def test_what_is_preempted_before_it_was_loaded_is_still_in_its_slots() -> None:
    blocks, pool = _blocks(8, 8)
    seq = _computed(blocks, "a", 8)
    blocks.evict(seq)
    blocks.begin([])
    blocks.end()
    taken = pool.allocate(8)  # nothing is cached any more
    pool.free(taken)
    assert blocks.restore(seq, 0) and seq.num_computed_tokens == 7
    blocks.evict(seq)
    assert blocks.begin([]) is None, "nothing is copied in or out"
    assert pool.num_owned_blocks == 0 and blocks.swap.num_used == 2
    assert blocks.restore(seq, 0) and seq.num_computed_tokens == 7
    batch = blocks.begin([BatchRow(seq, 1)])
    assert batch is not None and [block for _, block in batch.swap_in] == seq.block_table
    blocks.end()
    assert blocks.swap.num_used == 0
    blocks.check()


def test_a_partial_block_counts_for_the_tokens_that_it_holds() -> None:
    blocks, pool = _blocks(8, 8)
    seq = _computed(blocks, "a", 7)
    blocks.evict(seq)
    blocks.begin([])
    blocks.end()
    pool.free(pool.allocate(8))
    assert blocks.restore(seq, 0) and seq.num_computed_tokens == 6


def test_a_block_that_was_never_copied_to_is_read_where_its_content_is() -> None:
    blocks, pool = _blocks(8, 8)
    parent = _computed(blocks, "a", 7)
    child = Sequence(RequestId("a"), 0, 1, list(parent.token_ids), 7, SamplingParams())
    assert blocks.share(parent, child)
    partial = child.block_table[1]
    blocks.evict(child)
    batch = blocks.begin([BatchRow(parent, 1)])
    assert batch is not None and not batch.block_copies
    assert [block for block, _ in batch.swap_out] == [parent.block_table[1]] and partial != parent.block_table[1]
    blocks.end()
    blocks.check()
    blocks.give_back(parent)
    assert pool.num_owned_blocks == 0


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_shared_block_is_saved_where_nobody_would_find_it(is_cached: bool) -> None:
    pool = BlockPool(8, BLOCK, enable_prefix_caching=is_cached)
    blocks = SequenceBlocks(pool, SPEC, 8)
    parent = _computed(blocks, "a", 2 * BLOCK + 1)
    child = Sequence(RequestId("a"), 0, 1, list(parent.token_ids), parent.num_tokens, SamplingParams())
    assert blocks.share(parent, child)
    blocks.evict(child)
    blocks.give_back(parent)
    assert blocks.swap.num_used == (0 if is_cached else 2) == pool.num_owned_blocks, "what is read stays"
    blocks.begin([])
    blocks.end()
    assert blocks.restore(child, 0) and child.num_computed_tokens == 2 * BLOCK


def test_a_block_that_goes_out_and_is_found_makes_no_room_for_who_finds_it() -> None:
    blocks, pool = _blocks(3, 8)
    blocks.evict(_computed(blocks, "a", 2 * BLOCK + 1))
    taken = pool.allocate(1)
    again = Sequence(RequestId("b"), 0, 0, list(range(3 * BLOCK)), 3 * BLOCK, SamplingParams())
    assert len(blocks.known.find(again)[0].hits) == 2 and blocks.num_available == 2
    assert blocks.shortage(again)[0] == 1 and not blocks.restore(again, 0)
    pool.free(taken)
    assert blocks.restore(again, 0)


def test_blocks_that_this_worker_begins_with_are_its_to_keep() -> None:
    for is_retained_elsewhere in (False, True):
        blocks, pool = _blocks(4, 0)
        seq = _computed(blocks, "a", BLOCK + 1)
        [name, block] = seq.block_hashes[0], seq.block_table[0]
        pool.forget(block)
        pool.publish(block, name, spare=True)
        blocks.give_back(seq)
        seq.is_retained_elsewhere = is_retained_elsewhere
        assert blocks.restore(seq, 0) and seq.block_table[0] == block and pool.is_spare(block) is is_retained_elsewhere


def test_full_blocks_are_shared_where_no_block_is_free_and_a_part_of_one_is_not() -> None:
    for num_tokens, is_shared in ((2 * BLOCK + 1, True), (2 * BLOCK, False)):
        blocks, pool = _blocks(-(-num_tokens // BLOCK), 0)
        parent = _computed(blocks, "a", num_tokens)
        child = Sequence(RequestId("a"), 0, 1, list(parent.token_ids), num_tokens, SamplingParams())
        assert not pool.num_free_blocks and blocks.share(parent, child) is is_shared
        assert child.block_table == (parent.block_table[:2] if is_shared else [])


def test_a_fork_knows_of_the_blocks_that_it_shares_what_its_parent_knows() -> None:
    blocks, _ = _blocks(8, 0)
    parent = _computed(blocks, "a", 2 * BLOCK + 1)
    parent.num_thin_blocks, parent.num_cached_tokens = 1, BLOCK
    child = Sequence(RequestId("a"), 0, 1, list(parent.token_ids), parent.num_tokens, SamplingParams())
    assert blocks.share(parent, child)
    for one in (parent, child):
        one.token_ids = [*one.token_ids, *[7 + one.choice] * BLOCK]
        assert (one.num_thin_blocks, one.num_cached_tokens, one.num_published_blocks) == (1, BLOCK, 2)
        blocks.cover(one)
        blocks.count(one, BLOCK)
    assert parent.block_hashes[:2] == child.block_hashes[:2] and parent.block_hashes[2:] != child.block_hashes[2:]


def test_known_tokens_are_covered_whole_or_not_at_all() -> None:
    blocks, pool = _blocks(3, 0)
    seq = _computed(blocks, "a", 2 * BLOCK)
    seq.token_ids += [7] * (BLOCK + 1)
    table = list(seq.block_table)
    assert not blocks.cover(seq) and seq.block_table == table and pool.num_free_blocks == 1
    seq.token_ids.pop()
    assert blocks.cover(seq) and len(seq.block_table) == 3


def test_a_step_that_only_swaps_leaves_copies_to_the_next_one_that_computes() -> None:
    blocks, _ = _blocks(8, 8)
    parent = _computed(blocks, "a", 7)
    child = Sequence(RequestId("a"), 0, 1, list(parent.token_ids), 7, SamplingParams())
    assert blocks.share(parent, child)
    blocks.evict(_computed(blocks, "b", 7, first=100))
    batch = blocks.begin([])
    assert batch is not None and batch.swap_out and not batch.block_copies, "an engine copies none without rows"
    blocks.end()
    batch = blocks.begin([BatchRow(child, 1)])
    assert batch is not None and batch.block_copies == [(parent.block_table[1], child.block_table[1])]


def test_a_copy_into_a_block_that_is_given_back_never_runs() -> None:
    blocks, pool = _blocks(8, 0)
    pool_blocks, copies = pool.allocate(2), pool.allocate(1)
    seqs = [Sequence(RequestId("a"), 0, choice, list(range(6)), 6, SamplingParams()) for choice in range(2)]
    blocks.deal(seqs, 6, pool_blocks, copies)
    blocks.give_back(seqs[1])
    batch = blocks.begin([BatchRow(seqs[0], 1)])
    assert batch is not None and not batch.block_copies
    blocks.end()
    blocks.give_back(seqs[0])
    assert pool.num_owned_blocks == 0


def test_a_copy_from_host_memory_into_a_block_that_is_given_back_never_runs() -> None:
    pool, host = BlockPool(4, BLOCK), TierIndex(2)
    blocks = SequenceBlocks(pool, SPEC, 2, PrefixCache(pool, host=host))
    tokens = list(range(2 * BLOCK + 1))
    for name in hash_blocks(tokens, BLOCK, prefix_salt(SPEC, b"")):
        host.reserve(name)
        host.fill(name)
    for take_away in (blocks.give_back, blocks.evict):
        seq = Sequence(RequestId("a"), 0, 0, tokens, len(tokens), SamplingParams())
        assert blocks.restore(seq, 0) and seq.num_computed_tokens == 2 * BLOCK and blocks.is_loading(seq)
        take_away(seq)
        assert not host.num_pinned and pool.num_free_blocks == 4
        assert blocks.begin([]) is None and not blocks.swap.num_used
    seq = Sequence(RequestId("b"), 0, 0, tokens, len(tokens), SamplingParams())
    assert blocks.restore(seq, 0)
    batch = blocks.begin([BatchRow(seq, 1)])
    assert batch is not None and [block for _, block in batch.swap_in] == seq.block_table[:2]
    blocks.end()
    blocks.count(seq, 1)
    assert pool.match_prefix(seq.block_hashes) == seq.block_table[:2], "found once they are there"


def test_thin_blocks_go_out_and_come_back_into_shares_of_frames() -> None:
    spec = msgspec.structs.replace(SPEC, num_layers=2, windows=(0, 3), block_size=BLOCK)
    pool = FramePool(6, BLOCK, frames_of(spec))
    blocks = SequenceBlocks(pool, spec, 8, PrefixCache(pool, spec=spec))
    seq = Sequence(RequestId("a"), 0, 0, list(range(6 * BLOCK)), 6 * BLOCK, SamplingParams())
    thin = spec.num_left_out(seq.num_tokens)
    assert thin == 4
    blocks.deal([seq], seq.num_tokens, pool.allocate(6, thin), [])
    seq.num_thin_blocks = thin
    assert pool.num_free_blocks == 2 and [pool.is_thin(block) for block in seq.block_table] == 4 * [True] + 2 * [False]
    assert blocks.num_freed_by(seq) == 4
    table = list(seq.block_table)
    blocks.evict(seq)
    assert blocks.num_available == 2 + 2, "thin ones are nobody's before they are copied"
    batch = blocks.begin([])
    assert batch is not None
    assert [block for block, _ in batch.swap_out] == [~block for block in table[:4]] + table[4:]
    blocks.end()
    assert pool.num_free_blocks == 6
    others = pool.allocate(2)
    assert blocks.shortage(seq)[0] == 0 and blocks.restore(seq, 0)
    batch = blocks.begin([])
    assert batch is not None and sum(block < 0 for _, block in batch.swap_in) == 4 == seq.num_thin_blocks
    assert [pool.is_thin(block) for block in seq.block_table] == 4 * [True] + 2 * [False]
    assert seq.num_computed_tokens == 6 * BLOCK and pool.num_free_blocks == 0
    blocks.end()
    blocks.give_back(seq)
    pool.free(others)
    blocks.check()
    assert pool.num_free_blocks == 6


def test_whole_blocks_that_go_out_make_no_room_for_thin_ones() -> None:
    spec = msgspec.structs.replace(SPEC, num_layers=2, windows=(0, 3), block_size=BLOCK)
    pool = FramePool(6, BLOCK, frames_of(spec))
    blocks = SequenceBlocks(pool, spec, 16, PrefixCache(pool, spec=spec))
    seq = Sequence(RequestId("a"), 0, 0, list(range(6 * BLOCK)), 6 * BLOCK, SamplingParams(), num_thin_blocks=4)
    blocks.deal([seq], seq.num_tokens, pool.allocate(6, 4), [])
    blocks.evict(seq)
    blocks.begin([])
    blocks.end()
    blocks.evict(_computed(blocks, "b", 6 * BLOCK, first=100))
    assert blocks.num_available == 6 and pool.num_free_blocks == 0
    assert blocks.shortage(seq)[0] == 2 and not blocks.restore(seq, 0)
    blocks.begin([])
    blocks.end()
    assert blocks.restore(seq, 0)
