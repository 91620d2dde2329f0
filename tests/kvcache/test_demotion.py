"""What a step copies to host memory beside its work is bounded by tokens: blocks of models with states are long."""

from __future__ import annotations

import pytest

from kvferry.common.errors import CapacityError
from kvferry.kvcache.blocks import BlockPool
from kvferry.kvcache.copy_costs import CopyCosts
from kvferry.kvcache.demotion import Demotion
from kvferry.kvcache.tiers import TierIndex

NUM_BLOCKS = 128


def _full(block_size: int, costs: CopyCosts | None = None) -> Demotion:
    """A demotion from a pool that is all cache."""
    pool = BlockPool(NUM_BLOCKS, block_size)
    blocks = pool.allocate(NUM_BLOCKS)
    for number, block in enumerate(blocks):
        pool.publish(block, number.to_bytes(16, "little"))
    pool.free(blocks)
    return Demotion(pool, TierIndex(NUM_BLOCKS), costs or CopyCosts())


@pytest.mark.parametrize(
    ("block_size", "num_tokens", "count"), [(8, 1, 8), (16, 1, 8), (32, 1, 4), (2048, 64, 1), (2048, 4096, 5)]
)
def test_beside_a_step_as_many_tokens_of_long_blocks_are_copied_as_of_short_ones(
    block_size: int, num_tokens: int, count: int
) -> None:
    assert len(_full(block_size).copies(num_tokens)) == count


def test_an_idle_step_copies_few_long_blocks_until_their_cost_is_known() -> None:
    assert [len(_full(size).idle_copies()) for size in (16, 128, 2048)] == [16, 2, 1]
    assert len(_full(2048, CopyCosts(block_s=0.001, token_s=1.0)).idle_copies()) == 5


def test_what_a_block_had_is_copied_while_its_owner_keeps_it_and_not_for_whoever_gets_it_then() -> None:
    for is_kept in (True, False):
        demotion = _full(16)
        pool = demotion._pool
        held = pool.allocate(NUM_BLOCKS - 1)
        [block] = demotion.allocate(1, 0)
        assert list(pool.displaced) == [block] and not demotion.is_quiet
        if not is_kept:
            pool.free([block])
            assert pool.allocate(1) == [block], "by somebody who writes to it at once"
        assert [copied for copied, _ in demotion.copies(1)] == ([block] if is_kept else [])
        demotion.end()
        pool.free([block, *held])
        pool.check()
        assert demotion.is_quiet


def test_a_block_that_is_being_copied_goes_to_nobody_though_its_owner_gives_it_back() -> None:
    """Who gets it may write at once, as a remote writer does, and the copy would have some of that."""
    demotion = _full(16)
    pool = demotion._pool
    held = pool.allocate(NUM_BLOCKS - 1)
    [block] = demotion.allocate(1, 0)
    assert [copied for copied, _ in demotion.copies(1)] == [block]
    pool.free([block])
    assert pool.num_free_blocks == 0
    demotion.end()
    assert pool.allocate(1) == [block]
    pool.free([block, *held])
    pool.check()


def test_a_cached_block_that_is_being_copied_ahead_is_not_evicted() -> None:
    demotion = _full(16)
    pool = demotion._pool
    ahead = [block for block, _ in demotion.copies(1)]
    assert ahead and pool.num_free_blocks == NUM_BLOCKS - len(ahead)
    others = pool.allocate(pool.num_free_blocks)
    assert not set(others) & set(ahead)
    demotion.end()
    pool.free([*others, *pool.allocate(len(ahead))])
    pool.check()


def test_what_a_grant_takes_is_not_copied_as_a_remote_writer_writes_there_at_once() -> None:
    demotion = _full(16)
    pool = demotion._pool
    [block] = demotion.allocate(1, 0)
    granted = pool.allocate(1)
    with pytest.raises(CapacityError):
        demotion.allocate(NUM_BLOCKS, 0)
    granted += pool.allocate(1)
    assert list(pool.displaced) == [block]
    assert not {copied for copied, _ in demotion.copies(64)} & set(granted)


def test_an_idle_step_takes_no_content_from_host_memory() -> None:
    demotion = _full(16)
    demotion._host = host = TierIndex(8)
    for number in range(6):
        host.reserve(b"%016d" % number)
        host.fill(b"%016d" % number)
    assert len(demotion.idle_copies()) == 2 and len(host) == 6


def test_where_copies_do_not_pay_one_a_step_shows_a_change() -> None:
    demotion = _full(16, CopyCosts(block_s=1.0, token_s=1e-3))
    [displaced] = demotion.allocate(1, 0)
    [(copied, _)] = demotion.copies(64)
    assert copied != displaced and not demotion._pool.displaced
