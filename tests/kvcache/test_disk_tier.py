"""A `DiskTier` reads what is worth the wait, writes what host memory loses next, and leaves a broken disk alone."""

from __future__ import annotations

from collections.abc import Sequence as ListOf

import pytest

from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.kvcache.disk_tier import DiskResult, DiskTask, DiskTier
from kvferry.kvcache.tiers import TierIndex
from kvferry.tests.fake_clock import FakeClock

from .fake_disk import FakeDisk

NAMES = [bytes([number]) * 16 for number in range(60)]


class _Bench:
    """A tier over a disk that holds some blocks at its start."""

    def __init__(self, num_host: int = 16, num_disk: int = 16, on_disk: ListOf[bytes] = ()) -> None:
        stored = [(name, slot) for slot, name in enumerate(on_disk)]
        self.disk = FakeDisk(num_disk, [b""] * num_host, stored)
        self.disk.content = {slot: (name, name) for name, slot in stored}
        self.host, self.clock = TierIndex(num_host), FakeClock()
        self.failed: list[DiskResult] = []
        self.told: list[tuple[str, bytes]] = []
        self.tier = DiskTier(self.disk, self.host, self.clock, self.failed.append)
        self.tier.report_to(self)

    def stored(self, block_hash: bytes, tier: str) -> None:
        assert tier == "disk"
        self.told.append(("stored", block_hash))

    def evicted(self, block_hash: bytes, tier: str) -> None:
        assert tier == "disk"
        self.told.append(("evicted", block_hash))

    def ask(self, names: ListOf[bytes], within_s: float | None = None) -> Sequence:
        seq = Sequence(RequestId("r"), 0, 0, [1], 1, SamplingParams())
        self.tier.ask(seq, names, lambda num_blocks: within_s)
        return seq

    def fill_host(self, names: ListOf[bytes]) -> None:
        for name in names:
            self.host.reserve(name)
            self.host.fill(name)

    def work(self, *, took_s: float = 1e-6) -> list[bytes]:
        """Carry out all tasks, take their results, and return which blocks they were about."""
        names = self.asked
        self.disk.work(took_s=took_s)
        self.tier.advance()
        self.tier.check()
        return names

    @property
    def asked(self) -> list[bytes]:
        return [task.block_hash for task in self.disk.tasks]


@pytest.mark.parametrize(("within_s", "waits_s"), [(None, 1.0), (5.0, 5.0), (0.5, 0.5)])
def test_a_sequence_waits_as_long_as_its_blocks_are_worth_and_fails_to_once(
    within_s: float | None, waits_s: float
) -> None:
    bench = _Bench(on_disk=NAMES[:2])
    bench.clock.advance(100)
    seq = bench.ask(NAMES[:2], within_s)
    bench.clock.advance(waits_s * 0.75)
    assert bench.tier.awaits(seq)
    bench.clock.advance(waits_s * 0.25)
    assert not bench.tier.awaits(seq) and not bench.tier.awaits(seq) and bench.tier.num_failures == 1
    bench.work()
    assert bench.host.find(NAMES[1]) is not None and bench.tier.num_read_blocks == 2, "for others"
    bench.tier.forget(seq)
    assert not bench.host.num_pinned


def test_what_is_on_its_way_to_host_memory_is_worth_a_wait() -> None:
    bench = _Bench()
    bench.host.reserve(NAMES[0])
    assert bench.tier.has(NAMES[0]) and not bench.tier.has(NAMES[1])
    assert bench.tier.awaits(bench.ask(NAMES[:1]))
    bench.host.fill(NAMES[0])


def test_blocks_are_read_where_the_disk_is_sooner_with_all_that_is_under_way() -> None:
    bench = _Bench(num_host=40, num_disk=40, on_disk=NAMES[:10])
    bench.ask(NAMES[:1], 1e-9)
    assert bench.work(took_s=1.0) == NAMES[:1], "as it is not known yet how long that takes"
    bench.ask(NAMES[1:3], 2.0)
    assert not bench.asked
    bench.ask(NAMES[1:3], 2.1)
    assert bench.asked == NAMES[1:3]
    bench.ask(NAMES[3:4], 3.0)
    assert bench.asked == NAMES[1:3]
    bench.disk.work(took_s=1.0)
    bench.ask(NAMES[3:4], 1.1)
    assert bench.asked == NAMES[3:4], "what has ended is not waited for"
    bench.work(took_s=1.0)
    bench.fill_host(NAMES[20:30])
    bench.tier.advance(is_idle=True)
    assert bench.asked == NAMES[20:30]
    bench.ask(NAMES[4:5], 11.0)
    assert bench.asked == NAMES[20:30]
    bench.work()
    bench.ask(NAMES[4:5], 1.1)
    assert bench.work() == NAMES[4:5] and bench.tier.num_written_blocks == 10


def test_nothing_is_read_behind_what_is_not_there() -> None:
    bench = _Bench(on_disk=[NAMES[0], NAMES[2]])
    bench.ask(NAMES[:3])
    assert bench.asked == NAMES[:1]


def test_what_was_read_is_the_last_that_the_disk_evicts() -> None:
    bench = _Bench(num_host=4, num_disk=2, on_disk=NAMES[:2])
    bench.tier.forget(bench.ask(NAMES[:1]))
    bench.work()
    bench.host.keep_longest(NAMES[0])
    bench.fill_host(NAMES[2:5])
    bench.host.keep_longest(NAMES[0])
    bench.tier.advance()
    assert set(bench.tier.readable()) == {NAMES[0]} and bench.told == [("evicted", NAMES[1])]


def test_the_next_to_be_evicted_are_written_and_an_idle_engine_writes_what_has_room() -> None:
    bench = _Bench(num_host=8, num_disk=6)
    bench.fill_host(NAMES[:6])
    assert bench.work() == []
    bench.tier.advance()
    assert bench.asked == NAMES[:1], "a half of the smaller tier, less what is free above"
    bench.work()
    bench.tier.advance(is_idle=True)
    assert bench.asked == NAMES[1:6]
    bench.work()
    assert not bench.tier.index.num_free and bench.tier.num_written_blocks == 6
    bench.fill_host(NAMES[6:8])
    bench.tier.advance(is_idle=True)
    assert not bench.asked, "nothing gives way for what is not lost yet"


def test_a_slow_disk_gets_a_few_writes_at_a_time_and_none_of_what_is_lost_meanwhile() -> None:
    bench = _Bench(num_host=40, num_disk=60)
    bench.fill_host(NAMES[:40])
    for _ in range(2):
        bench.tier.advance(is_idle=True)
        assert bench.asked == NAMES[:32]
    for name in NAMES[32:36]:
        bench.host.discard(name)
    assert bench.work() == NAMES[:32] and bench.asked == NAMES[36:40]


def _broken(task: DiskTask) -> str:
    return "Input/output error"


def test_a_write_that_failed_is_not_found_and_not_counted() -> None:
    bench = _Bench()
    bench.fill_host(NAMES[:1])
    bench.disk.fails = _broken
    bench.tier.advance(is_idle=True)
    bench.work()
    assert [result.task.block_hash for result in bench.failed] == NAMES[:1] and not bench.told
    assert not bench.tier.has(NAMES[0]) and bench.tier.num_written_blocks == 0 and not bench.host.num_pinned


def test_a_disk_that_fails_four_times_in_a_row_is_left_alone_for_a_while() -> None:
    bench = _Bench(num_host=40, num_disk=40, on_disk=NAMES[:20])
    bench.ask(NAMES[:8])
    bench.disk.fails = lambda task: "" if task.block_hash == NAMES[3] else "Input/output error"
    bench.disk.work(7)
    bench.tier.advance()
    assert len(bench.failed) == 6 and bench.tier.has(NAMES[19]), "three, and three: one was read in between"
    told = [("evicted", name) for name in [*NAMES[:3], *NAMES[4:7]]]
    assert bench.told == told
    bench.ask(NAMES[8:10])
    bench.work()
    told += [("evicted", name) for name in [NAMES[7], NAMES[3], *NAMES[8:20]]]
    assert sorted(bench.told) == sorted(told) and len(bench.failed) == 9, "of each once"
    assert bench.host.num_free == 39 and bench.host.find(NAMES[3]) is not None
    bench.fill_host(NAMES[30:40])
    bench.ask(NAMES[10:12])
    bench.tier.advance(is_idle=True)
    assert not bench.asked and not bench.tier.has(NAMES[19]) and not list(bench.tier.readable())
    del bench.told[:]
    bench.clock.advance(30)
    assert bench.tier.has(NAMES[19])
    assert sorted(bench.told) == [("stored", name) for name in [NAMES[3], *NAMES[10:20]]]


def test_a_write_that_ends_while_the_disk_is_left_alone_is_told_of_afterwards() -> None:
    bench = _Bench(num_host=40, num_disk=40)
    bench.fill_host(NAMES[:5])
    bench.tier.advance(is_idle=True)
    bench.disk.fails = lambda task: "" if task.block_hash == NAMES[4] else "No space left on device"
    bench.work()
    assert not bench.told and set(bench.tier.index) == {NAMES[4]}
    bench.clock.advance(30)
    assert bench.tier.has(NAMES[4]) and bench.told == [("stored", NAMES[4])]
