"""Which prompt computes what, in which order, over which blocks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.common.errors import CapacityError
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import BACKGROUND_PRIORITY, RequestId, SamplingParams, Sequence
from kvferry.kvcache.blocks import BlockPool, hash_blocks
from kvferry.kvcache.frame_pool import block_pool
from kvferry.kvcache.prefix_cache import PrefixCache
from kvferry.kvcache.thin import twin
from kvferry.kvcache.tiers import TierIndex
from kvferry.prefill.scheduler import PrefillScheduler, Prompt
from kvferry.tests.fake_clock import FakeClock

WINDOWED = KVCacheSpec(
    model="m", num_layers=2, num_kv_heads=1, head_dim=8, block_size=4, dtype="float32", windows=(0, 3)
)


def _sequence(name: str, num_tokens: int, *, first: int = 0, priority: int = 0) -> Sequence:
    tokens = list(range(first, first + num_tokens))
    return Sequence(RequestId(name), 0, 0, tokens, num_tokens, SamplingParams(), priority=priority)


def _scheduler(num_blocks: int = 64, budget: int = 16, rows: int = 8) -> tuple[PrefillScheduler, BlockPool, FakeClock]:
    pool, clock = BlockPool(num_blocks, 4), FakeClock()
    return PrefillScheduler(pool, clock, max_num_batched_tokens=budget, max_num_seqs=rows), pool, clock


def _step(scheduler: PrefillScheduler) -> tuple[list[tuple[str, int]], list[Prompt]]:
    """One step: what was scheduled, and the prompts that are done with it."""
    scheduled = scheduler.schedule()
    if scheduled is None:
        return [], []
    batch, prompts = scheduled
    rows = [(row.seq.request_id, row.num_scheduled_tokens) for row in batch.rows]
    done = [
        prompt
        for row, prompt in zip(batch.rows, prompts, strict=True)
        if scheduler.complete(prompt, row.num_scheduled_tokens)
    ]
    return [(str(name), count) for name, count in rows], done


def test_a_long_prompt_is_cut_into_chunks_of_the_budget() -> None:
    scheduler, pool, _ = _scheduler()
    scheduler.add(_sequence("a", 40), b"")
    assert [_step(scheduler)[0] for _ in range(4)] == [[("a", 16)], [("a", 16)], [("a", 8)], []]
    assert pool.num_owned_blocks == 10  # the blocks stay their owner's


def test_slow_steps_get_fewer_tokens_but_never_too_few_to_move_on() -> None:
    scheduler, _, _ = _scheduler(num_blocks=1024, budget=512)
    scheduler.add(_sequence("a", 2000), b"")
    assert _step(scheduler)[0] == [("a", 500)]
    for _ in range(50):
        scheduler.observe(step_s=1.0, num_tokens=200)
    assert _step(scheduler)[0] == [("a", 100)]
    for _ in range(50):
        scheduler.observe(step_s=9.0, num_tokens=100)
    assert _step(scheduler)[0] == [("a", 64)]


def test_steps_of_background_prompts_alone_are_short() -> None:
    scheduler, _, _ = _scheduler(num_blocks=1024, budget=512)
    scheduler.add(_sequence("b", 1000, priority=BACKGROUND_PRIORITY), b"")
    assert _step(scheduler)[0] == [("b", 10)]
    scheduler.add(_sequence("a", 100, first=5000), b"")
    assert _step(scheduler)[0] == [("a", 100), ("b", 400)]


def test_a_short_rest_of_a_prompt_goes_along() -> None:
    scheduler, _, _ = _scheduler(num_blocks=1024, budget=512)
    scheduler.add(_sequence("a", 512), b"")  # 500 tokens are half a second's work
    assert _step(scheduler)[0] == [("a", 512)]
    scheduler.add(_sequence("b", 513, first=1000), b"")  # more than a step may have
    assert [_step(scheduler)[0] for _ in range(2)] == [[("b", 500)], [("b", 13)]]


def test_short_prompts_share_a_step() -> None:
    scheduler, _, _ = _scheduler()
    for name in "abc":
        scheduler.add(_sequence(name, 5, first=ord(name) * 100), b"")
    assert _step(scheduler)[0] == [("a", 5), ("b", 5), ("c", 5)]


def test_what_a_prompt_waits_for_from_the_disk_is_let_go_of_when_it_begins_and_when_it_ends_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler, _, _ = _scheduler()
    asked, forgotten = list[Sequence](), list[Sequence]()
    monkeypatch.setattr(scheduler.cache, "awaits", lambda seq, hashes: asked.append(seq))
    monkeypatch.setattr(scheduler.cache, "forget", forgotten.append)
    prompts = [scheduler.add(_sequence(name, 8), b"") for name in "ab"]
    assert asked == [prompt.seq for prompt in prompts], "asked for now, it is here when their turn has come"
    scheduler.remove(prompts[0])
    assert forgotten == [prompts[0].seq]
    _step(scheduler)
    assert forgotten == [prompt.seq for prompt in prompts]


def test_a_prompt_that_has_begun_goes_on_beyond_its_deadline() -> None:
    scheduler, _, clock = _scheduler()
    scheduler.add(_sequence("a", 40), b"", 1.0)
    late = scheduler.add(_sequence("b", 40, first=100), b"", 1.0)
    _step(scheduler)
    clock.advance(1.0)
    assert scheduler.expired() == [late]


def test_a_step_has_no_more_prompts_than_rows() -> None:
    scheduler, _, _ = _scheduler(budget=512, rows=2)
    for number in range(3):
        scheduler.add(_sequence(f"r{number}", 8, first=100 * number), b"")
    assert [len(_step(scheduler)[0]) for _ in range(3)] == [2, 1, 0]


@pytest.mark.parametrize("is_retained_elsewhere", [True, False])
def test_what_another_worker_keeps_is_spare_here(is_retained_elsewhere: bool) -> None:
    scheduler, pool, _ = _scheduler()
    seq = _sequence("a", 8)
    seq.is_retained_elsewhere = is_retained_elsewhere
    scheduler.add(seq, b"")
    _step(scheduler)
    assert [pool.is_spare(block) for block in seq.block_table] == [is_retained_elsewhere] * 2
    pool.free(seq.block_table)
    again = _sequence("b", 9)
    scheduler.add(again, b"")
    _step(scheduler)
    assert again.num_cached_tokens == 8 and not any(pool.is_spare(block) for block in again.block_table)


def test_a_short_prompt_overtakes_a_long_one_that_has_time_left() -> None:
    scheduler, _, _ = _scheduler(num_blocks=256)
    scheduler.add(_sequence("long", 400), b"")
    assert _step(scheduler)[0] == [("long", 16)]
    scheduler.add(_sequence("short", 8, first=1000), b"")
    assert _step(scheduler)[0] == [("short", 8), ("long", 8)]


def test_a_long_prompt_does_not_starve_behind_a_stream_of_short_ones() -> None:
    scheduler, _, clock = _scheduler(num_blocks=4096)
    scheduler.add(_sequence("long", 64), b"")
    for number in range(100):
        scheduler.add(_sequence(f"s{number}", 16, first=1000 * number), b"")
        _rows, done = _step(scheduler)
        clock.advance(16 * 1e-3)
        if any(prompt.seq.request_id == "long" for prompt in done):
            return
    pytest.fail("the long prompt never ended")


def test_a_step_that_stalled_is_no_new_speed_and_a_prompt_that_came_then_is_not_overtaken_for_long() -> None:
    scheduler, _, clock = _scheduler(num_blocks=4096, budget=512)
    for _ in range(50):
        scheduler.observe(step_s=0.05, num_tokens=512)
    scheduler.observe(step_s=5.0, num_tokens=64)
    scheduler.add(_sequence("long", 8000), b"")  # at the speed that there is it takes a second
    for _ in range(20):
        scheduler.observe(step_s=0.05, num_tokens=512)
    clock.advance(3.0)
    scheduler.add(_sequence("short", 64, first=10_000), b"")
    assert _step(scheduler)[0] == [("long", 512)]


def test_the_first_step_that_is_measured_says_how_slow_a_machine_is() -> None:
    scheduler, _, _ = _scheduler(num_blocks=1024, budget=512)
    scheduler.observe(step_s=0.5, num_tokens=100)
    scheduler.add(_sequence("a", 2000), b"")
    assert _step(scheduler)[0] == [("a", 100)]


def test_a_step_of_few_tokens_says_little_of_the_speed() -> None:
    scheduler, _, _ = _scheduler(num_blocks=1024, budget=512)
    for _ in range(5):
        scheduler.observe(step_s=0.5, num_tokens=1)
    scheduler.add(_sequence("a", 2000), b"")
    [(_, num_tokens)] = _step(scheduler)[0]
    assert num_tokens > 450


def test_priority_comes_before_the_due_time() -> None:
    scheduler, _, _ = _scheduler()
    scheduler.add(_sequence("later", 8, priority=1), b"")
    scheduler.add(_sequence("first", 16, first=100, priority=0), b"")
    assert _step(scheduler)[0] == [("first", 16)]


def test_a_prompt_waits_for_blocks_and_nobody_passes_it() -> None:
    scheduler, pool, _ = _scheduler(num_blocks=4)
    first = scheduler.add(_sequence("a", 12), b"")
    scheduler.add(_sequence("b", 12, first=100), b"")
    assert _step(scheduler)[0] == [("a", 12)]
    assert _step(scheduler)[0] == []
    pool.free(first.seq.block_table)
    assert _step(scheduler)[0] == [("b", 12)]


@pytest.mark.parametrize("priority", [0, 1])
def test_a_prompt_that_has_begun_goes_on_though_an_earlier_one_waits_for_its_blocks(priority: int) -> None:
    scheduler, pool, _ = _scheduler(num_blocks=4, budget=4)
    long = scheduler.add(_sequence("long", 12, priority=priority), b"")
    assert _step(scheduler)[0] == [("long", 4)]
    scheduler.add(_sequence("short", 8, first=100), b"")
    scheduler.add(_sequence("tiny", 4, first=200, priority=1), b"")
    assert [_step(scheduler)[0] for _ in range(2)] == [[("long", 4)], [("long", 4)]]
    assert _step(scheduler)[0] == [], "nobody who has not begun passes the short one"
    pool.free(long.seq.block_table)
    assert _step(scheduler)[0] == [("short", 4)]


def test_a_prompt_that_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler, _, _ = _scheduler(num_blocks=4)
    with pytest.raises(CapacityError, match="needs 5 blocks, the pool has 4"):
        scheduler.add(_sequence("a", 17), b"")


def test_a_known_prefix_is_not_computed_again_but_the_last_token_always_is() -> None:
    scheduler, pool, _ = _scheduler()
    first = scheduler.add(_sequence("a", 16), b"")
    _step(scheduler)
    pool.free(first.seq.block_table)
    again = scheduler.add(_sequence("b", 16), b"")
    assert _step(scheduler)[0] == [("b", 4)]
    assert again.seq.num_cached_tokens == 12


def test_what_comes_from_host_memory_is_there_with_the_first_step_and_found_under_its_own_names_behind_it() -> None:
    pool, host = block_pool(WINDOWED, 16), TierIndex(8)
    cache = PrefixCache(pool, host=host, spec=WINDOWED)
    scheduler = PrefillScheduler(pool, FakeClock(), max_num_batched_tokens=64, max_num_seqs=8, cache=cache)
    seq = _sequence("a", 24)
    hashes = hash_blocks(seq.token_ids, 4, b"")
    names = [twin(hashes[0]), twin(hashes[1]), *hashes[2:]]
    [known] = pool.allocate(1)
    pool.publish(known, names[0])
    pool.free([known])
    for name in names[1:5]:
        host.reserve(name)
        host.fill(name)
    prompt = scheduler.add(seq, b"")
    scheduled = scheduler.schedule()
    assert scheduled is not None and scheduled[0].rows[0].num_scheduled_tokens == 4
    assert (seq.num_cached_tokens, seq.num_promoted_tokens, seq.num_thin_blocks) == (20, 16, 2)
    assert len(scheduled[0].swap_in) == 4 and list(pool.published()) == [names[0]], "the others are not there yet"
    cache.end()
    scheduler.complete(prompt, 4)
    assert pool.match_prefix(names) == seq.block_table


@pytest.mark.parametrize(("num_tokens", "num_cached"), [(21, 0), (23, 20)])
def test_what_a_handoff_ships_whole_is_found_whole(num_tokens: int, num_cached: int) -> None:
    """The fourth block is shipped whole for two tokens less, though to compute on from here a thin one would do."""
    pool = block_pool(WINDOWED, 16)
    cache = PrefixCache(pool, spec=WINDOWED)
    scheduler = PrefillScheduler(pool, FakeClock(), max_num_batched_tokens=64, max_num_seqs=8, cache=cache)
    assert WINDOWED.num_thin_blocks(20) == 4 == WINDOWED.num_left_out(21) + 1
    seq = _sequence("a", num_tokens)
    hashes = hash_blocks(seq.token_ids, 4, b"")
    blocks = pool.allocate(5, 4)
    for place, block in enumerate(blocks):
        pool.publish(block, twin(hashes[place]) if place < 4 else hashes[place])
    pool.free(blocks)
    scheduler.add(seq, b"")
    _step(scheduler)
    assert seq.num_cached_tokens == num_cached


def test_prompt_logprobs_skip_the_prefix_cache() -> None:
    scheduler, pool, _ = _scheduler()
    first = scheduler.add(_sequence("a", 16), b"")
    _step(scheduler)
    pool.free(first.seq.block_table)
    seq = _sequence("b", 16)
    seq.sampling = SamplingParams(prompt_logprobs=1)
    scheduler.add(seq, b"")
    assert _step(scheduler)[0] == [("b", 16)]


def test_another_salt_finds_nothing() -> None:
    scheduler, pool, _ = _scheduler()
    first = scheduler.add(_sequence("a", 16), b"tenant-a")
    _step(scheduler)
    pool.free(first.seq.block_table)
    scheduler.add(_sequence("b", 16), b"tenant-b")
    assert _step(scheduler)[0] == [("b", 16)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    budget=st.integers(1, 24),
    num_blocks=st.integers(16, 40),
)
def test_every_prompt_ends_within_the_budget_and_no_block_is_lost(
    lengths: list[int], budget: int, num_blocks: int
) -> None:
    scheduler, pool, clock = _scheduler(num_blocks=num_blocks, budget=budget)
    expected = set()
    for number, length in enumerate(lengths):
        scheduler.add(_sequence(f"r{number}", length, first=number % 3), b"")
        expected.add(f"r{number}")
    for _ in range(2000):
        rows, done = _step(scheduler)
        assert sum(count for _, count in rows) <= budget
        clock.advance(0.01)
        for prompt in done:
            expected.remove(str(prompt.seq.request_id))
            pool.free(prompt.seq.block_table)
        pool.check()
        if not expected:
            break
    assert not expected
    assert pool.num_free_blocks == num_blocks


@pytest.mark.parametrize(
    ("is_caching", "prompt_logprobs", "num_queries"), [(True, None, 9), (False, None, 0), (True, 1, 0)]
)
def test_tokens_are_counted_as_looked_up_where_they_are(
    is_caching: bool, prompt_logprobs: int | None, num_queries: int
) -> None:
    scheduler, pool, _ = _scheduler()
    pool.enable_prefix_caching = is_caching
    seq = _sequence("a", 9)
    seq.sampling = SamplingParams(prompt_logprobs=prompt_logprobs)
    scheduler.add(seq, b"")
    _step(scheduler)
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (num_queries, 0)
