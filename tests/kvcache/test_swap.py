"""Preempted KV in host memory: when it goes there, that it comes back whole, and that no slot is lost."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.common.batch import Batch, BatchRow
from kvferry.common.request import Sequence
from kvferry.engine.cuda.rows import foretell
from kvferry.kvcache.copy_costs import CopyCosts
from kvferry.kvcache.swap import SwapSpace

from ..decode.tagged import BLOCK, TaggedScheduler


def _old_and_young(num_swap_blocks: int, num_blocks: int = 4) -> tuple[TaggedScheduler, Sequence, Sequence]:
    """Two sequences of two full blocks each fill the pool; the next token of each needs one more."""
    bench = TaggedScheduler(num_blocks, num_swap_blocks=num_swap_blocks)
    old = bench.adopted("old", 8, 6, first=0, arrival=0)
    young = bench.adopted("young", 8, 6, first=100, arrival=1)
    return bench, old, young


def test_a_preempted_sequence_goes_on_from_host_memory_and_computes_nothing_again() -> None:
    bench, old, young = _old_and_young(num_swap_blocks=4)
    batch = bench.step()
    assert batch is not None and len(batch.swap_out) == 2 and not young.block_table
    assert bench.swap.num_used == 2 and bench.scheduler.num_waiting == 1
    bench.run()
    assert bench.num_computed == len(old.token_ids) + len(young.token_ids) - 2 * 8 - 2
    assert bench.swap.num_loaded_blocks > 0 and bench.swap.num_used == 0


def test_a_block_that_goes_out_serves_another_sequence_in_the_same_step() -> None:
    bench, old, _ = _old_and_young(num_swap_blocks=4)
    batch = bench.begin()
    assert batch is not None
    assert old.block_table[-1] in {block for block, _ in batch.swap_out}
    assert bench.pool.num_free_blocks == 0, "the other one is read until the step ends"
    bench.compute(batch)
    bench.finish(batch)
    assert bench.pool.num_free_blocks == 1


def test_without_room_in_host_memory_it_is_computed_again() -> None:
    bench, _, young = _old_and_young(num_swap_blocks=1)
    batch = bench.step()
    assert batch is not None and not batch.swap_out and not young.block_table
    bench.run()


def test_it_is_computed_again_where_that_is_cheaper() -> None:
    bench, _, _ = _old_and_young(num_swap_blocks=4)
    bench.swap.costs.block_s, bench.swap.costs.token_s = 1.0, 0.01
    batch = bench.step()
    assert batch is not None and not batch.swap_out
    bench.run()


def test_waiting_tokens_do_not_count_what_lies_in_host_memory() -> None:
    bench, _, _ = _old_and_young(num_swap_blocks=4)
    bench.step()
    assert bench.scheduler.waiting_tokens == 1


def test_a_sequence_that_ends_in_host_memory_leaves_nothing() -> None:
    bench, old, young = _old_and_young(num_swap_blocks=4)
    batch = bench.begin()
    assert batch is not None and bench.swap.num_used == 2
    bench.end(young)  # while its blocks are being copied
    assert bench.swap.num_used == 0
    bench.compute(batch)
    bench.finish(batch)
    bench.end(old)
    assert bench.scheduler.is_quiet and bench.pool.num_owned_blocks == 0


def test_a_sequence_that_ends_while_it_is_loaded_gives_its_blocks_back_after_the_step() -> None:
    bench, old, young = _old_and_young(num_swap_blocks=4)
    bench.step()
    bench.end(old)
    batch = bench.begin()
    assert batch is not None and (batch.swap_in or bench.pool.num_cached_blocks < 2)
    bench.end(young)
    assert bench.pool.num_owned_blocks > 0
    bench.compute(batch)
    bench.finish(batch)
    assert bench.scheduler.is_quiet


def test_the_only_sequence_preempts_itself_with_a_batch_of_copies_alone() -> None:
    bench = TaggedScheduler(4, num_swap_blocks=4)
    seq = bench.adopted("a", 8, 6)
    bench.granted = bench.pool.allocate(2)
    batch = bench.step()
    assert batch is not None and not batch.rows and len(batch.swap_out) == 2
    assert bench.step() is None, "it waits for blocks"
    bench.pool.free(bench.granted)
    bench.granted = []
    bench.run()
    assert seq.num_tokens == 14


def test_blocks_that_others_hold_and_that_are_found_by_their_hash_stay_where_they_are() -> None:
    bench = TaggedScheduler(6, num_swap_blocks=6)
    parent = bench.adopted("a", 8, 12)
    child = bench.fork(parent, 1)
    batch = bench.step()
    while batch is not None and not batch.swap_out:
        batch = bench.step()
    assert batch is not None
    shared = set(parent.block_table[:2])
    assert not child.block_table and not shared & {block for block, _ in batch.swap_out}
    bench.run()


def test_blocks_that_are_still_cached_are_not_copied_in() -> None:
    bench, old, _ = _old_and_young(num_swap_blocks=4, num_blocks=5)
    bench.step()  # one block free: the old one takes it, the young one goes
    assert bench.swap.num_used == 2
    bench.end(old)
    batch = bench.step()
    assert batch is not None and not batch.swap_in, "nobody has needed its blocks"
    bench.run()


def test_a_step_that_swaps_is_never_the_one_foretold() -> None:
    bench = TaggedScheduler(16)
    seq = bench.adopted("a", 8, 6)
    batch = bench.step()
    assert batch is not None
    seq.num_computed_tokens -= 1
    last = seq.token_ids.pop()
    forecast = foretell(batch, BLOCK, 1000)
    seq.num_computed_tokens += 1
    seq.token_ids.append(last)
    assert forecast is not None
    following = Batch([BatchRow(seq, 1)])
    assert forecast.fits(following, [last])
    assert not forecast.fits(Batch(following.rows, swap_out=[(9, 0)]), [last])
    assert not forecast.fits(Batch(following.rows, swap_in=[(0, 9)]), [last])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), enable_prefix_caching=st.booleans(), num_swap_blocks=st.sampled_from([0, 2, 8, 30]))
def test_every_row_reads_its_own_tokens_whatever_is_swapped_shared_and_ended(
    seed: int, enable_prefix_caching: bool, num_swap_blocks: int
) -> None:
    random = Random(seed)
    bench = TaggedScheduler(
        random.randint(9, 20),
        num_swap_blocks=num_swap_blocks,
        budget=random.randint(4, 20),
        rows=random.randint(2, 5),
        enable_prefix_caching=enable_prefix_caching,
    )
    number = 0
    for _ in range(2000):
        if number == 15 and not bench.live:
            break
        if number < 15 and random.random() < 0.4:
            number += 1
            _arrive(bench, random, number)
        batch = bench.begin()
        if batch is not None:
            bench.compute(batch)
        if bench.live and random.random() < 0.05:
            bench.end(random.choice(list(bench.live)))
        if random.random() < 0.2:
            bench.pool.free(bench.granted)
            bench.granted = []
        elif number < 15 and random.random() < 0.2:
            bench.granted += bench.pool.allocate(min(2, bench.pool.num_free_blocks))
        if batch is not None:
            bench.finish(batch, swap_s=random.choice([1e-6, 1e-3, 1.0]))
    bench.pool.free(bench.granted)
    assert bench.scheduler.is_quiet and bench.pool.num_owned_blocks == 0


def _arrive(bench: TaggedScheduler, random: Random, number: int) -> None:
    length, outputs = random.randint(1, 16), random.randint(2, 12)
    order = {"arrival": number, "priority": random.randint(0, 2), "first": 20 * random.randint(0, 2)}
    if -(-length // BLOCK) + bench.scheduler.growth_reserve > bench.pool.num_free_blocks:
        bench.prompt(f"p{number}", length, outputs, **order)
        return
    seq = bench.adopted(f"a{number}", length, outputs, **order)
    if random.random() < 0.5:
        bench.fork(seq, 1)


def test_a_block_is_worth_saving_where_two_copies_of_it_are_sooner_done_than_its_tokens() -> None:
    for block_s, is_worth_it in ((0.9, True), (1.1, False)):
        swap = SwapSpace(4, CopyCosts(block_s=block_s, token_s=1.0))
        assert swap.wants(4, 8) is is_worth_it and not swap.wants(5, 100) and not swap.wants(0, 100)
