"""The prefix cache's lower tiers under a decode scheduler: what comes back is what went, whatever happens beside it."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.kvcache.blocks import BlockPool
from kvferry.kvcache.copy_costs import CopyCosts
from kvferry.kvcache.disk_tier import DiskTask
from kvferry.kvcache.journal import open_journal
from kvferry.kvcache.prefix_cache import PrefixCache
from kvferry.kvcache.tiers import TierIndex

from .tagged import BLOCK, TaggedScheduler


def _run(bench: TaggedScheduler) -> None:
    """Until nothing lives and nothing is left to copy."""
    for _ in range(300):
        bench.disk.work()
        if bench.step() is None and not bench.live:
            assert bench.cache.disk is None or not bench.cache.disk._tickets, "nobody waits for what is pinned"
            return
    raise AssertionError("it does not come to an end")


def test_what_the_device_evicts_is_promoted_when_it_is_asked_for_again() -> None:
    bench = TaggedScheduler(8, num_host_blocks=16, budget=64)
    bench.prompt("a", 6 * BLOCK, 2, first=0)
    _run(bench)
    assert len(bench.cache.host) == 6, "an idle engine copies what is cached"
    bench.prompt("b", 6 * BLOCK, 2, first=100)
    _run(bench)
    computed = bench.num_computed
    again = bench.prompt("c", 6 * BLOCK, 2, first=0)
    batch = bench.begin()
    assert batch is not None and len(batch.swap_in) == 4 and again.num_cached_tokens == 5 * BLOCK, "one was still there"
    assert again.num_published_blocks < 5, "nobody finds them before they are copied"
    bench.compute(batch)
    bench.finish(batch)
    _run(bench)
    assert bench.num_computed - computed == BLOCK + 1
    assert bench.cache.num_promoted_blocks == 4


def test_a_step_that_takes_cached_blocks_copies_them_before_it_computes() -> None:
    bench = TaggedScheduler(8, num_host_blocks=16, budget=64)
    bench.prompt("a", 6 * BLOCK, 2, first=0)
    while bench.live:
        bench.step()
    assert not len(bench.cache.host)
    bench.prompt("b", 6 * BLOCK, 2, first=100, arrival=1)
    batch = bench.begin()
    assert batch is not None and len(batch.swap_out) >= 4
    bench.compute(batch)
    bench.finish(batch)
    assert len(bench.cache.host) >= 4
    _run(bench)


@pytest.mark.parametrize("is_ended", [False, True])
def test_what_room_for_forced_tokens_displaced_is_not_copied_out_as_others_have_written_it(is_ended: bool) -> None:
    bench = TaggedScheduler(8, num_host_blocks=16, budget=64)
    bench.prompt("a", 6 * BLOCK, 1, first=0)
    while bench.live:
        bench.step()
    seq = bench.adopted("b", BLOCK, 2 * BLOCK, first=100, arrival=1)
    bench.grant(bench.pool.num_free_blocks - bench.pool.num_cached_blocks)
    assert bench.scheduler.room_for(seq, BLOCK) == BLOCK - 1 and list(bench.pool.displaced) == seq.block_table[1:]
    if is_ended:
        bench.end(seq)
        bench.grant(1)
    bench.step()
    bench.pool.free(bench.granted)
    bench.granted.clear()
    _run(bench)
    bench.prompt("c", 6 * BLOCK + 1, 2, first=0, arrival=2)
    _run(bench)


def test_what_a_sequence_waits_for_from_the_disk_is_asked_for_once() -> None:
    bench, num_asked = TaggedScheduler(8, num_host_blocks=8, num_disk_blocks=8), 0
    seq = bench.sequence("a", range(2 * BLOCK))

    def hashes() -> list[bytes]:
        nonlocal num_asked
        num_asked += 1
        return []

    for _ in range(3):
        bench.cache.awaits(seq, hashes)
    assert num_asked == 1


def test_a_block_that_is_being_copied_is_not_granted() -> None:
    bench = TaggedScheduler(4, num_host_blocks=8, budget=64)
    bench.prompt("a", 3 * BLOCK, 2, first=0)
    while bench.live:
        bench.step()
    batch = bench.begin()
    assert batch is not None and len(batch.swap_out) == 3 and not batch.rows
    assert bench.pool.num_free_blocks == 1 and bench.pool.num_cached_blocks == 3
    bench.grant(4)
    bench.compute(batch)
    bench.finish(batch)
    assert len(bench.granted) == 1 and bench.pool.num_free_blocks == 3
    bench.pool.free(bench.granted)
    bench.granted = []
    bench.grant(4)
    bench.pool.free(bench.granted)
    bench.granted = []
    seq = bench.prompt("b", 3 * BLOCK, 2, first=0)
    _run(bench)
    assert seq.num_cached_tokens == 2 * BLOCK


def test_a_tier_that_is_slower_than_computing_is_not_used() -> None:
    bench = TaggedScheduler(8, num_host_blocks=16, budget=64)
    for number in range(4):
        bench.prompt(f"a{number}", 6 * BLOCK, 2, first=100 * (number % 2), arrival=number)
        while bench.live:
            batch = bench.begin()
            assert batch is not None
            bench.compute(batch)
            bench.finish(batch, swap_s=1e3 * (len(batch.swap_out) + len(batch.swap_in)))
    assert bench.cache.num_promoted_blocks == 0
    assert bench.cache.num_demoted_blocks < 12, "but one now and then, to see whether that has changed"


def _first_on_disk() -> TaggedScheduler:
    """Several prompts have come; the first one's blocks are on disk alone."""
    bench = TaggedScheduler(8, num_host_blocks=10, num_disk_blocks=40, budget=64)
    prompts = [bench.prompt("a0", 5 * BLOCK, 2, first=0)]
    _run(bench)
    for number in range(1, 6):
        prompts.append(bench.prompt(f"a{number}", 5 * BLOCK, 2, first=100 * number, arrival=number))
        _run(bench)
    assert bench.cache.disk is not None and not any(value in bench.cache.host for value in prompts[0].block_hashes)
    assert all(bench.cache.disk.has(value) for value in prompts[0].block_hashes[:5])
    return bench


def test_what_host_memory_evicts_comes_back_from_the_disk() -> None:
    bench = _first_on_disk()
    computed = bench.num_computed
    seq = bench.prompt("again", 5 * BLOCK, 2, first=0)
    assert bench.begin() is None, "it waits for the disk"
    other = bench.prompt("other", 3, 2, first=500, arrival=9)
    while other in bench.live:
        assert bench.step() is not None, "others go on"
    assert seq.num_cached_tokens == 0
    _run(bench)
    assert seq.num_cached_tokens == 4 * BLOCK
    assert bench.num_computed - computed == BLOCK + 1 + 3 + 1
    assert bench.cache.num_failures == 0


def test_nothing_stays_pinned_for_what_ends_while_it_waits_for_the_disk() -> None:
    bench = _first_on_disk()
    seq = bench.prompt("again", 5 * BLOCK, 2, first=0)
    assert bench.begin() is None
    bench.end(seq)
    _run(bench)


@pytest.mark.parametrize("how", ["late", "spoilt"])
def test_a_prompt_computes_what_the_disk_does_not_bring(how: str) -> None:
    bench = _first_on_disk()
    computed = bench.num_computed
    bench.prompt("again", 5 * BLOCK, 2, first=0)
    assert bench.begin() is None
    if how == "late":
        bench.clock.advance(60)
    else:
        bench.disk.fails = lambda task: "" if task.is_write else "not what was written"
        bench.disk.work()
    while bench.live:
        assert bench.step() is not None
    assert bench.num_computed - computed == 5 * BLOCK + 1
    assert bench.cache.num_failures >= 1
    _run(bench)


def test_what_waits_for_the_disk_takes_half_of_host_memory_at_most() -> None:
    """Those that wait keep what was read for them: with all of it, nothing that the device evicts had a place."""
    bench = _first_on_disk()
    disk, host = bench.cache.disk, bench.cache.host
    assert disk is not None and host.num_slots == 10
    known = [value for value in disk.index if value not in host]
    assert len(known) > host.num_slots
    for name, hashes in (("a", known[:4]), ("b", known[4:])):
        disk.ask(bench.sequence(name, []), hashes, lambda num_blocks: None)
    assert [task.block_hash for task in bench.disk.tasks if not task.is_write] == known[:5]
    assert host.num_pinned - disk._num_writes <= 5


def test_blocks_that_are_not_what_was_written_do_not_turn_a_disk_off_that_works() -> None:
    """As all are where another rank's file is not the one that they were written to."""
    bench = _first_on_disk()
    disk = bench.cache.disk
    assert disk is not None
    spoilt = bench.prompt("again", 5 * BLOCK, 2, first=0).block_hashes[:5]
    bench.disk.fails = lambda task: "" if task.is_write else "not what was written"
    assert bench.begin() is None
    assert len(bench.disk.tasks) >= 4
    bench.disk.work()
    disk.advance()
    assert disk.num_failures >= 4 and not any(disk.has(value) for value in spoilt[:4])
    assert len(disk.index) and set(disk.readable()) == set(disk.index)
    bench.disk.fails = lambda task: ""
    _run(bench)


def test_a_disk_that_is_left_alone_counts_as_empty_until_it_is_used_again() -> None:
    """For routers that knew it before, and for one that comes meanwhile. Hosts and devices are told of as ever."""
    bench = _first_on_disk()
    journal = open_journal(bench.pool, bench.cache)
    told: dict[str, dict[str, set[bytes]]] = {}

    def drain() -> None:
        for router, change in journal.drain():
            held = told.setdefault(router, {}).setdefault(change.tier, set())
            held |= {change.stored[at : at + 16] for at in range(0, len(change.stored), 16)}
            held -= {change.evicted[at : at + 16] for at in range(0, len(change.evicted), 16)}

    journal.router_joined("before")
    drain()
    on_disk, disk = bench.prompt("again", 5 * BLOCK, 2, first=0).block_hashes[:4], bench.cache.disk
    assert disk is not None and told["before"]["disk"] == set(disk.index) >= set(on_disk)
    bench.disk.fails = lambda task: "Input/output error"
    assert bench.begin() is None
    _run(bench)
    assert disk.num_failures >= 4 and len(disk.index), "most of what it holds was not tried"
    journal.router_joined("meanwhile")
    drain()
    assert told["before"]["disk"] == set() == told["meanwhile"].get("disk", set())
    assert told["before"]["host"] == told["meanwhile"]["host"] == set(bench.cache.host)
    assert not any(bench.cache.has_below(value) for value in disk.index if value not in bench.cache.host)
    bench.disk.fails = lambda task: ""
    bench.clock.advance(30)
    _run(bench)
    drain()
    assert told["before"]["disk"] == told["meanwhile"]["disk"] == set(disk.index) != set()


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), num_swap_blocks=st.sampled_from([0, 6]), num_disk_blocks=st.sampled_from([0, 12]))
def test_every_row_reads_its_own_tokens_whatever_lies_in_which_tier(
    seed: int, num_swap_blocks: int, num_disk_blocks: int
) -> None:
    random = Random(seed)
    bench = TaggedScheduler(
        random.randint(9, 16),
        num_swap_blocks=num_swap_blocks,
        num_host_blocks=random.randint(2, 20),
        num_disk_blocks=num_disk_blocks,
        budget=random.randint(4, 20),
        rows=random.randint(2, 5),
    )
    bench.disk.fails = lambda task: _weather(random, task)
    number = 0
    for _ in range(2000):
        if number == 20 and not bench.live:
            break
        if number < 20 and random.random() < 0.3:
            number += 1
            _arrive(bench, random, number)
        batch = bench.begin()
        _meanwhile(bench, random, may_grant=number < 20)
        if batch is not None:
            bench.compute(batch)
        _meanwhile(bench, random, may_grant=number < 20)
        if batch is not None:
            bench.finish(batch, swap_s=random.choice([1e-6, 1e-6, 1e-3, 1.0]))
        bench.clock.advance(random.choice([0.0, 0.01, 1.0]))
        bench.cache.check()
    bench.pool.free(bench.granted)
    bench.disk.fails = lambda task: ""
    while bench.cache.begin(None) is not None or bench.disk.work():
        bench.cache.end()
    assert bench.scheduler.is_quiet and bench.pool.num_owned_blocks == 0 and bench.cache.host.num_pinned == 0


def _weather(random: Random, task: DiskTask) -> str:
    return "broken" if random.random() < 0.1 else ""


def _meanwhile(bench: TaggedScheduler, random: Random, *, may_grant: bool) -> None:
    if bench.live and random.random() < 0.05:
        bench.end(random.choice(list(bench.live)))
    if random.random() < 0.2:
        bench.pool.free(bench.granted)
        bench.granted = []
    elif may_grant and random.random() < 0.2:
        bench.grant(2)
    bench.disk.work(random.randint(0, 4), took_s=random.choice([1e-6, 1e-3, 1.0]))


def _arrive(bench: TaggedScheduler, random: Random, number: int) -> None:
    length, outputs, first = random.randint(1, 20), random.randint(2, 8), 50 * random.randint(0, 4)
    order = {"arrival": number, "priority": random.randint(0, 2), "first": first}
    if random.random() < 0.7 or -(-length // BLOCK) + bench.scheduler.growth_reserve > bench.pool.num_free_blocks:
        bench.prompt(f"p{number}", length, outputs, **order)
        return
    seq = bench.adopted(f"a{number}", length, outputs, **order)
    if random.random() < 0.5:
        bench.fork(seq, 1)


def test_blocks_are_lifted_for_a_reader_elsewhere() -> None:
    bench = TaggedScheduler(8, num_host_blocks=16, budget=64)
    first = bench.prompt("a", 6 * BLOCK, 2, first=0)
    _run(bench)
    bench.prompt("b", 7 * BLOCK, 2, first=100)
    _run(bench)
    hashes, done = first.block_hashes, []
    assert not bench.cache.lift(hashes, 0, lambda: done.append(1), reserve=3), "there is no room for so much"
    assert bench.cache.lift(hashes, 0, lambda: done.append(1), reserve=2)
    assert not done and len(bench.pool.match_prefix(hashes)) == 0
    batch = bench.step()
    assert batch is not None and len(batch.swap_in) == 6 and not batch.rows
    blocks = bench.pool.match_prefix(hashes)
    assert done == [1] and len(blocks) == 6 and bench.pool.num_owned_blocks == 0
    assert [token for block in blocks for token in bench._memory[block]] == first.token_ids[: 6 * BLOCK]
    assert not bench.cache.lift(hashes, 0, lambda: done.append(1)), "all is there"


def test_what_lies_on_the_device_makes_no_room_for_what_is_lifted_behind_it() -> None:
    pool, host = BlockPool(4, BLOCK), TierIndex(8)
    cache, names = PrefixCache(pool, host=host), [bytes([number]) * 16 for number in range(5)]
    blocks = pool.allocate(4)
    for block, name in zip(blocks, [names[0], b"x" * 16, b"y" * 16, b"z" * 16], strict=True):
        pool.publish(block, name)
        pool.free([block])
    for name in names[1:]:
        host.reserve(name)
        host.fill(name)
    assert not cache.lift(names, 0, lambda: None), "five do not fit"
    assert cache.lift(names[:4], 0, lambda: None)
    cache.begin(None)
    cache.end()
    assert len(pool.match_prefix(names)) == 4 and pool.num_owned_blocks == 0


def test_reads_are_waited_for_as_long_as_computing_would_take_less_their_copies() -> None:
    costs = CopyCosts(block_s=0.1, token_s=0.1)
    assert PrefixCache(BlockPool(4, BLOCK), costs=costs)._limit_s(3) == pytest.approx(3 * (BLOCK * 0.1 - 0.1))
