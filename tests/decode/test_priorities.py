"""Classes on a decode worker: who gets a row or blocks from whom, and that everybody ends."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvferry.common.request import Sequence
from kvferry.decode.scheduler import DecodeScheduler

from .tagged import BLOCK, TaggedScheduler, names


def test_a_higher_class_takes_the_row_of_the_youngest_of_the_lowest_which_keeps_its_blocks() -> None:
    bench = TaggedScheduler(64, rows=2)
    bench.adopted("low", 8, 9, arrival=0, priority=2)
    bench.adopted("lower", 8, 9, arrival=1, priority=2, first=100)
    bench.step()
    urgent = bench.prompt("urgent", 6, 3, arrival=9, priority=0, first=200)
    assert sorted(names(bench.step())) == ["low", "urgent"]
    [parked] = bench.scheduler.queues.parked
    assert parked.request_id == "lower" and parked.block_table and bench.scheduler.num_preemptions == 1
    while urgent in bench.live:
        bench.step()
    assert sorted(names(bench.step())) == ["low", "lower"]
    num_computed = bench.num_computed
    bench.run()
    assert bench.num_computed - num_computed < 10, "nothing is computed again"


def test_an_adopted_sequence_of_a_higher_class_takes_a_row_as_well() -> None:
    bench = TaggedScheduler(64, rows=1)
    bench.adopted("low", 8, 5, priority=1)
    bench.step()
    bench.adopted("urgent", 8, 3, arrival=5, priority=0, first=100)
    assert names(bench.step()) == ["urgent"]
    bench.run()


@pytest.mark.parametrize("arrival", [0, 9])
def test_an_equal_class_never_takes_a_row(arrival: int) -> None:
    bench = TaggedScheduler(64, rows=1)
    bench.adopted("first", 8, 5, arrival=5, priority=1)
    bench.step()
    bench.adopted("second", 8, 5, arrival=arrival, priority=1, first=100)
    assert names(bench.step()) == ["first"] and not bench.scheduler.num_preemptions
    bench.run()


def test_a_higher_class_takes_blocks_from_lower_ones_if_they_suffice() -> None:
    bench = TaggedScheduler(8, num_swap_blocks=8)
    bench.adopted("kept", 6, 3, arrival=0, priority=0)
    low = bench.adopted("low", 16, 4, arrival=1, priority=3, first=100)
    bench.step()
    bench.prompt("huge", 26, 3, arrival=2, priority=1, first=200)
    bench.step()
    assert low in bench.scheduler.queues.running, "it would not be enough: nobody is preempted"
    bench.prompt("urgent", 12, 3, arrival=3, priority=0, first=300)
    batch = bench.step()
    assert batch is not None and "urgent" in names(batch) and len(batch.swap_out) >= 4
    assert not low.block_table
    bench.run()


def test_a_step_that_only_copies_out_is_not_in_vain() -> None:
    bench = TaggedScheduler(6, num_swap_blocks=8)
    seq = bench.adopted("a", 15, 5)
    bench.step()
    bench.scheduler._preempt(seq)
    seq.is_fetching = True
    batch = bench.begin()
    assert batch is not None and batch.swap_out and not batch.rows and not bench.scheduler.is_step_vain


def test_of_a_preempted_sequence_those_tokens_wait_that_were_not_saved() -> None:
    bench = TaggedScheduler(6, num_swap_blocks=8)
    low = bench.adopted("low", 15, 5, arrival=0, priority=1)
    bench.step()
    bench.prompt("urgent", 16, 1, arrival=1, priority=0, first=100)
    bench.step()
    assert not low.block_table and bench.scheduler.waiting_tokens == 1
    bench.run()


def test_blocks_to_grow_into_are_not_kept_for_those_who_are_preempted() -> None:
    bench = TaggedScheduler(6)
    bench.adopted("low", 11, 3, arrival=0, priority=1)
    bench.step()
    bench.prompt("urgent", 23, 1, arrival=1, priority=0, first=100)
    assert names(bench.step()) == ["urgent"], "all six blocks are for it"
    bench.run()


def test_no_more_are_preempted_than_a_higher_class_needs_blocks_of() -> None:
    bench = TaggedScheduler(8)
    for arrival, name in enumerate(("kept", "low")):
        bench.adopted(name, 11, 3, arrival=arrival, priority=1, first=100 * arrival)
    bench.step()
    bench.prompt("urgent", 15, 1, arrival=2, priority=0, first=200)
    assert names(bench.step()) == ["kept", "urgent"] and bench.scheduler.num_preemptions == 1
    bench.run()


def test_nobody_is_preempted_for_blocks_that_a_higher_class_has_in_common_with_it() -> None:
    bench = TaggedScheduler(8)
    bench.adopted("kept", 6, 3, arrival=0, priority=0)
    low = bench.adopted("low", 16, 4, arrival=1, priority=3, first=100)
    bench.step()
    bench.prompt("urgent", 26, 3, arrival=2, priority=0, first=100)  # low's four full blocks and three more
    bench.step()
    assert low in bench.scheduler.queues.running and not bench.scheduler.num_preemptions
    bench.run()


def test_an_older_sequence_of_the_same_class_waits_for_blocks() -> None:
    bench = TaggedScheduler(6)
    bench.adopted("young", 16, 4, arrival=5)
    bench.step()
    bench.prompt("old", 12, 3, arrival=0, first=100)
    assert names(bench.step()) == ["young"]
    bench.run()


def test_parked_sequences_run_while_an_older_one_waits_for_blocks() -> None:
    bench = TaggedScheduler(8, rows=1)
    bench.adopted("a", 8, 3, arrival=1)
    bench.adopted("b", 8, 3, arrival=2, first=100)
    bench.step()
    bench.prompt("large", 26, 2, arrival=0, first=200)
    assert bench.run() < 40


def test_blocks_of_a_parked_sequence_go_to_an_older_one_that_grows() -> None:
    bench = TaggedScheduler(4, rows=1)
    bench.adopted("old", 8, 6, arrival=0)
    parked = bench.adopted("young", 8, 3, arrival=1, first=100)
    assert parked in bench.scheduler.queues.parked
    assert names(bench.step()) == ["old"] and not parked.block_table
    bench.run()


class _Recorder:
    """Notes from whom a scheduler takes, and for whom."""

    def __init__(self, scheduler: DecodeScheduler) -> None:
        self.takes: list[tuple[str, Sequence, Sequence]] = []
        self._grow, self._admit = scheduler._grow, scheduler._admit
        self._preempt = scheduler._preempt
        self._taker: tuple[str, Sequence] | None = None
        scheduler._grow = self._on_grow  # type: ignore[method-assign]
        scheduler._admit = self._on_admit  # type: ignore[method-assign]
        scheduler._preempt = self._on_preempt  # type: ignore[method-assign]

    def _on_grow(self, seq: Sequence) -> bool:
        self._taker = ("grow", seq)
        return self._grow(seq)

    def _on_admit(self, seq: Sequence) -> bool:
        self._taker = ("admit", seq)
        return self._admit(seq)

    def _on_preempt(self, seq: Sequence) -> None:
        assert self._taker is not None
        self.takes.append((*self._taker, seq))
        self._preempt(seq)


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 4), num_swap_blocks=st.sampled_from([0, 3, 20]))
@example(seed=4866, rows=1, num_swap_blocks=0)  # the only one that runs gives its blocks back, and another is parked
def test_everybody_ends_and_nobody_takes_from_whom_it_was_taken_by(seed: int, rows: int, num_swap_blocks: int) -> None:
    """Random classes, more sequences than rows, and a pool that holds little more than the largest."""
    random = Random(seed)
    bench = TaggedScheduler(random.randint(8, 12), num_swap_blocks=num_swap_blocks, budget=8, rows=rows)
    recorder = _Recorder(bench.scheduler)
    num_left, num_idle = 12, 0
    for _ in range(3000):
        if num_left and random.random() < 0.3:
            num_left -= 1
            _arrive(bench, random, number=12 - num_left)
        if not num_left and not bench.live:
            break
        batch = bench.step()
        assert batch is not None or not bench.live, "work waits and nothing runs"
        num_idle = num_idle + 1 if batch is not None and not batch.rows else 0
        assert num_idle <= 2, "copies alone, again and again"
    assert not num_left and not bench.live and bench.scheduler.is_quiet
    for why, taker, victim in recorder.takes:
        assert victim.age_key >= taker.age_key
        assert why == "grow" or victim.priority > taker.priority


def _arrive(bench: TaggedScheduler, random: Random, number: int) -> None:
    length, outputs = random.randint(1, 20), random.randint(2, 10)
    order = {"arrival": number, "priority": random.randint(0, 3), "first": 100 * number}
    if -(-length // BLOCK) + bench.scheduler.growth_reserve <= bench.pool.num_free_blocks and random.random() < 0.5:
        bench.adopted(f"a{number}", length, outputs, **order)
    else:
        bench.prompt(f"p{number}", length, outputs, **order)
