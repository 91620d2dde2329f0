"""Continuous batching: growth, preemption, forks and local prompts over a block pool."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from kvferry.common.batch import Batch, RowOutput, StepOutput
from kvferry.common.errors import CapacityError
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import BACKGROUND_PRIORITY, RequestId, SamplingParams, Sequence
from kvferry.decode.scheduler import DecodeScheduler
from kvferry.kvcache.blocks import BlockPool

BLOCK = 4
SPEC = KVCacheSpec(model="m", num_layers=1, num_kv_heads=1, head_dim=8, block_size=BLOCK, dtype="float32")


def _scheduler(num_blocks: int = 64, budget: int = 16, rows: int = 8) -> tuple[DecodeScheduler, BlockPool]:
    pool = BlockPool(num_blocks, BLOCK)
    return DecodeScheduler(pool, SPEC, max_num_batched_tokens=budget, max_num_seqs=rows), pool


def _prompt(name: str, num_tokens: int, *, arrival: int = 0, first: int = 0) -> Sequence:
    tokens = list(range(first, first + num_tokens))
    return Sequence(RequestId(name), 0, 0, tokens, num_tokens, SamplingParams(), arrival=arrival)


def _adopted(scheduler: DecodeScheduler, pool: BlockPool, name: str, num_tokens: int, arrival: int = 0) -> Sequence:
    """A sequence whose prompt's KV came over the wire, with its first token."""
    seq = _prompt(name, num_tokens, arrival=arrival, first=1000 * arrival)
    seq.block_table = pool.allocate(-(-num_tokens // BLOCK))
    seq.num_computed_tokens = num_tokens
    seq.num_published_blocks = num_tokens // BLOCK
    seq.token_ids.append(7)
    scheduler.adopt(seq)
    return seq


def _rows(batch: Batch | None) -> list[tuple[str, int]]:
    return [] if batch is None else [(str(row.seq.request_id), row.num_scheduled_tokens) for row in batch.rows]


def _step(scheduler: DecodeScheduler) -> list[tuple[str, int]]:
    """One step in which every row that samples yields token 9."""
    batch = scheduler.schedule()
    if batch is None:
        return []
    rows, samples = _rows(batch), [row.samples for row in batch.rows]
    for row, sampled, alive in zip(batch.rows, samples, scheduler.complete(batch), strict=True):
        if sampled and alive:
            row.seq.token_ids.append(9)
    return rows


def test_decode_rows_come_first_and_chunks_fill_the_rest_of_the_budget() -> None:
    scheduler, pool = _scheduler()
    _adopted(scheduler, pool, "d", 5)
    scheduler.add(_prompt("p", 40, arrival=1))
    assert _step(scheduler) == [("d", 1), ("p", 15)]


def test_what_has_no_room_to_feed_its_answer_again_waits_without_blocks() -> None:
    scheduler, pool = _scheduler(num_blocks=4)
    seq = _prompt("a", 8)
    seq.block_table, seq.num_computed_tokens, seq.num_published_blocks = pool.allocate(2), 8, 2
    seq.token_ids += range(500, 505)
    taken = pool.allocate(1)
    scheduler.adopt(seq)
    assert scheduler.queues.waiting == [seq]
    scheduler.check()
    pool.free(taken)
    assert _step(scheduler) == [("a", 13)]


def test_who_is_preempted_for_an_older_one_has_no_row_in_the_same_step() -> None:
    """Its prompt has one token: without blocks it looks like one that decodes."""
    scheduler, pool = _scheduler(num_blocks=3)
    _adopted(scheduler, pool, "old", 8)
    young = _prompt("young", 1, arrival=1, first=900)
    young.block_table = pool.allocate(1)
    scheduler.adopt(young)
    assert _step(scheduler) == [("old", 1)] and scheduler.queues.waiting == [young] and not young.block_table


def test_a_chunk_of_one_token_stands_with_the_rows_that_decode() -> None:
    scheduler, _ = _scheduler(budget=8)
    scheduler.add(_prompt("first", 7, arrival=0))
    scheduler.add(_prompt("second", 20, arrival=1, first=500))
    assert _step(scheduler) == [("second", 1), ("first", 7)]


def test_what_a_step_takes_is_known_to_those_that_are_cut_by_it() -> None:
    scheduler, pool = _scheduler()
    _adopted(scheduler, pool, "d", 5)
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.observe(batch, StepOutput([RowOutput(())], 0.02, 1))
    assert scheduler.pace.decode_s(1) == 0.02


def test_prompts_in_the_background_are_cut_though_no_answer_runs() -> None:
    for priority, num_tokens in ((0, 512), (BACKGROUND_PRIORITY, 30)):
        scheduler, _ = _scheduler(num_blocks=1024, budget=512)
        seq = _prompt("p", 1000)
        seq.priority = priority
        scheduler.add(seq)
        assert _step(scheduler) == [("p", num_tokens)]


def test_the_oldest_chunk_moves_on_while_shorter_ones_pass_it() -> None:
    scheduler, _ = _scheduler()
    scheduler.add(_prompt("long", 60, arrival=0))
    scheduler.add(_prompt("short", 6, arrival=1, first=500))
    assert sorted(_step(scheduler)) == [("long", 10), ("short", 6)]


def test_a_sequence_takes_a_block_when_its_last_one_is_full() -> None:
    scheduler, pool = _scheduler()
    seq = _adopted(scheduler, pool, "d", 4)
    assert len(seq.block_table) == 1
    _step(scheduler)
    assert len(seq.block_table) == 2


def test_the_youngest_is_preempted_for_the_oldest_and_comes_back_through_the_prefix_cache() -> None:
    scheduler, pool = _scheduler(num_blocks=4)
    old = _adopted(scheduler, pool, "old", 8, arrival=0)
    young = _adopted(scheduler, pool, "young", 8, arrival=1)
    assert _step(scheduler) == [("old", 1)]
    assert scheduler.num_preemptions == 1 and young in scheduler.queues.waiting and not young.block_table
    scheduler.remove(old)
    assert _step(scheduler) == [("young", 9)]
    pool.check()


@pytest.mark.parametrize("num_cached", [0, 2 * BLOCK])
def test_what_a_preempted_prompt_finds_of_its_own_was_not_cached_for_it(num_cached: int) -> None:
    scheduler, pool = _scheduler(num_blocks=14, budget=4)
    if num_cached:
        scheduler.add(_prompt("before", num_cached + 1, first=500))
        while scheduler.num_running or scheduler.num_waiting:
            _step(scheduler)
            for seq in [seq for seq in scheduler.queues.running if seq.num_output_tokens]:
                scheduler.remove(seq)
    old, prompt = _adopted(scheduler, pool, "old", 4), _prompt("p", 40, arrival=1, first=500)
    scheduler.add(prompt)
    while not scheduler.num_preemptions:
        _step(scheduler)
    assert not prompt.block_table
    scheduler.remove(old)
    _step(scheduler)
    assert prompt.num_computed_tokens > num_cached and prompt.num_cached_tokens == num_cached


def test_a_prompt_is_counted_once_as_looked_up_however_often_it_is_preempted() -> None:
    scheduler, _ = _scheduler(num_blocks=8)
    old, young = _prompt("old", 9), _prompt("young", 9, arrival=1, first=100)
    for seq in (old, young):
        scheduler.add(seq)
    while not scheduler.num_preemptions:
        _step(scheduler)
    scheduler.remove(old)
    _step(scheduler)
    assert young.block_table and young.num_output_tokens
    assert (scheduler.blocks.prefix_queries, scheduler.blocks.prefix_hits) == (18, 0)


@pytest.mark.parametrize(("is_caching", "prompt_logprobs"), [(False, None), (True, 1)])
def test_a_prompt_that_is_not_looked_up_is_not_counted(is_caching: bool, prompt_logprobs: int | None) -> None:
    scheduler, pool = _scheduler()
    pool.enable_prefix_caching = is_caching
    seq = _prompt("a", 9)
    seq.sampling = SamplingParams(prompt_logprobs=prompt_logprobs)
    scheduler.add(seq)
    assert _step(scheduler) == [("a", 9)] and scheduler.blocks.prefix_queries == 0


def test_choices_that_begin_with_a_parents_prompt_are_not_counted_as_looked_up() -> None:
    scheduler, pool = _scheduler(num_blocks=3)
    parent = _adopted(scheduler, pool, "a", 9)
    child = _prompt("a", 9)
    child.choice = 1
    child.token_ids.append(8)
    scheduler.fork(parent, child)
    assert not child.block_table, "there was no room for a copy"
    scheduler.remove(parent)
    assert _step(scheduler) and scheduler.blocks.prefix_queries == 0


def test_there_are_no_more_rows_than_a_step_has_tokens() -> None:
    scheduler, pool = _scheduler(budget=4, rows=8)
    seqs = [_adopted(scheduler, pool, f"s{number}", 5, arrival=number) for number in range(6)]
    assert _step(scheduler) == [(f"s{number}", 1) for number in range(4)]
    assert (scheduler.num_running, scheduler.num_waiting) == (4, 2)
    for seq in seqs[:2]:
        scheduler.remove(seq)
    assert [name for name, _ in _step(scheduler)] == ["s2", "s3", "s4", "s5"]


def test_a_preempted_sequence_keeps_its_tokens_and_is_not_served_before_older_ones() -> None:
    scheduler, pool = _scheduler(num_blocks=4)
    _adopted(scheduler, pool, "old", 8, arrival=0)
    young = _adopted(scheduler, pool, "young", 8, arrival=1)
    tokens = list(young.token_ids)
    _step(scheduler)
    assert young.token_ids == tokens
    scheduler.add(_prompt("middle", 4, arrival=0))
    assert [str(seq.request_id) for seq in scheduler.queues.waiting] == ["middle", "young"]


def _resumed(scheduler: DecodeScheduler, pool: BlockPool, num_prompt: int, num_outputs: int) -> Sequence:
    """A sequence whose prompt's KV came over the wire, with an answer that was begun elsewhere."""
    seq = _prompt("r", num_prompt)
    seq.block_table = pool.allocate(-(-num_prompt // BLOCK))
    seq.num_computed_tokens = num_prompt
    seq.num_published_blocks = num_prompt // BLOCK
    seq.token_ids += [7] * num_outputs
    scheduler.adopt(seq)
    return seq


@pytest.mark.parametrize("num_outputs", [1, 2, 3, 7, 20])
def test_a_resumed_answer_has_blocks_for_all_that_is_fed_again(num_outputs: int) -> None:
    scheduler, pool = _scheduler()
    seq = _resumed(scheduler, pool, 6, num_outputs)
    num_fed = 0
    while num_fed < num_outputs:
        batch = scheduler.schedule()
        assert batch is not None
        [row] = batch.rows
        assert row.end <= len(seq.block_table) * BLOCK
        num_fed += row.num_scheduled_tokens
        scheduler.complete(batch)
    scheduler.remove(seq)
    assert pool.num_free_blocks == 64


def test_a_resumed_answer_without_room_waits_and_is_computed_when_there_is() -> None:
    scheduler, pool = _scheduler(num_blocks=8)
    other = _adopted(scheduler, pool, "d", 20)
    seq = _resumed(scheduler, pool, 6, 14)
    assert seq in scheduler.queues.waiting and not seq.block_table
    scheduler.remove(other)
    assert _step(scheduler) == [("r", 16)]
    pool.check()


def test_a_fork_shares_full_blocks_and_copies_the_partial_one() -> None:
    scheduler, pool = _scheduler()
    parent = _adopted(scheduler, pool, "a", 6)
    child = _prompt("a", 6)
    child.choice, child.token_ids = 1, [*child.token_ids, 8]
    scheduler.fork(parent, child)
    assert child.block_table[0] == parent.block_table[0] and child.block_table[1] != parent.block_table[1]
    batch = scheduler.schedule()
    assert batch is not None and batch.block_copies == [(parent.block_table[1], child.block_table[1])]
    scheduler.complete(batch)
    for seq in (parent, child):
        scheduler.remove(seq)
    assert pool.num_free_blocks == 64
    pool.check()


def test_the_source_of_a_copy_outlives_its_owner() -> None:
    scheduler, pool = _scheduler()
    parent = _adopted(scheduler, pool, "a", 6)
    source = parent.block_table[1]
    child = _prompt("a", 6)
    child.choice, child.token_ids = 1, [*child.token_ids, 8]
    scheduler.fork(parent, child)
    scheduler.remove(parent)
    assert pool.ref_count(source) == 1
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.complete(batch)
    assert pool.ref_count(source) == 0


def test_a_fork_without_room_waits_and_computes_what_it_lacks() -> None:
    scheduler, pool = _scheduler(num_blocks=3)
    parent = _adopted(scheduler, pool, "a", 6)
    pool.allocate(1)
    child = _prompt("a", 6)
    child.choice, child.token_ids = 1, [*child.token_ids, 8]
    scheduler.fork(parent, child)
    assert child in scheduler.queues.waiting and not child.block_table


def test_blocks_of_an_aborted_sequence_come_back_after_the_step_that_uses_them() -> None:
    scheduler, pool = _scheduler()
    seq = _adopted(scheduler, pool, "a", 6)
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.remove(seq)
    assert pool.num_owned_blocks == 2
    assert scheduler.complete(batch) == [False]
    assert pool.num_owned_blocks == 0


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler, _ = _scheduler(num_blocks=4)
    with pytest.raises(CapacityError, match="needs 5 blocks, the pool has 4"):
        scheduler.add(_prompt("a", 16))


def test_growth_reserve_counts_running_and_all_that_waits() -> None:
    scheduler, pool = _scheduler()
    _adopted(scheduler, pool, "a", 6)
    scheduler.add(_prompt("b", 9, arrival=1))
    assert scheduler.growth_reserve == 1 + 3


def test_short_sequences_fill_a_pool_of_long_blocks() -> None:
    """Few come to the end of theirs soon: one is left for all of them, not one for each."""
    pool, spec = BlockPool(8, 2048), structs.replace(SPEC, block_size=2048)
    scheduler = DecodeScheduler(pool, spec, max_num_batched_tokens=512, max_num_seqs=16)
    for number in range(10):
        scheduler.add(_prompt(str(number), 20, arrival=number, first=100 * number))
    _step(scheduler)
    assert (scheduler.num_running, pool.num_free_blocks) == (7, 1)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_blocks=st.integers(8, 24), budget=st.integers(4, 20))
def test_everything_ends_and_no_block_is_lost(data: st.DataObject, num_blocks: int, budget: int) -> None:
    """Random prompts, adoptions and aborts; each sequence ends after a few output tokens."""
    scheduler, pool = _scheduler(num_blocks, budget, rows=4)
    live: dict[Sequence, int] = {}
    number = 0
    for _ in range(400):
        if number < 12 and data.draw(st.booleans()):
            length = data.draw(st.integers(1, 20))
            number += 1
            if data.draw(st.booleans()):
                seq = _prompt(f"p{number}", length, arrival=number, first=number % 2)
                scheduler.add(seq)
            elif -(-length // BLOCK) <= pool.num_free_blocks - scheduler.growth_reserve and scheduler.queues.has_row:
                seq = _adopted(scheduler, pool, f"a{number}", length, arrival=number)
            else:
                continue
            live[seq] = seq.num_prompt_tokens + data.draw(st.integers(1, 10))
        batch = scheduler.schedule()
        victim = data.draw(st.sampled_from(list(live))) if live and data.draw(st.integers(0, 19)) == 0 else None
        if victim is not None:
            del live[victim]
            scheduler.remove(victim)
        if batch is not None:
            assert batch.num_tokens <= max(budget, len(batch.rows))
            samples = [row.samples for row in batch.rows]
            for row, sampled, alive in zip(batch.rows, samples, scheduler.complete(batch), strict=True):
                if alive and sampled:
                    row.seq.token_ids.append(9)
                    if row.seq.num_tokens >= live[row.seq]:
                        del live[row.seq]
                        scheduler.remove(row.seq)
        pool.check()
        if number >= 12 and not live:
            break
    assert not live
    assert pool.num_free_blocks == num_blocks
