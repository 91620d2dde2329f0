"""What routers are told adds up to what the pool and its tiers hold, whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvferry.kvcache import journal as journals
from kvferry.kvcache.blocks import BlockPool, hash_blocks
from kvferry.kvcache.journal import MAX_HASHES, CacheJournal
from kvferry.wire.workers import CacheChange

HASHES = hash_blocks(list(range(4 * 9)), 4, b"")


class _Listener:
    """A router's picture: what it was told, in order."""

    def __init__(self) -> None:
        self.held: set[tuple[str, bytes]] = set()
        self.next_seq = 0

    def take(self, change: CacheChange) -> None:
        if change.seq == 0:
            self.held.clear()
            self.next_seq = 0
        assert change.seq == self.next_seq
        self.next_seq += 1
        assert not set(_split(change.stored)) & set(_split(change.evicted))
        self.held |= {(change.tier, value) for value in _split(change.stored)}
        self.held -= {(change.tier, value) for value in _split(change.evicted)}


def _split(hashes: bytes) -> list[bytes]:
    return [hashes[start : start + 16] for start in range(0, len(hashes), 16)]


def _journal(pool: BlockPool, **limits: int) -> CacheJournal:
    journal = CacheJournal(**limits)
    journal.add_tier("device", pool.published)
    pool.listener = journal
    return journal


def _fill(pool: BlockPool, hashes: Iterable[bytes]) -> None:
    for value in hashes:
        blocks = pool.allocate(1)
        pool.publish(blocks[0], value)
        pool.free(blocks)


def test_a_session_begins_with_all_that_is_stored_and_goes_on_with_changes() -> None:
    pool = BlockPool(4, 4)
    journal = _journal(pool)
    _fill(pool, HASHES[:2])
    journal.router_joined("r")
    router = _Listener()
    first = list(journal.drain())
    assert [(who, change.seq) for who, change in first] == [("r", 0), ("r", 1)]
    for _, change in first:
        router.take(change)
    assert router.held == {("device", value) for value in HASHES[:2]}
    _fill(pool, HASHES[2:6])  # evicts the first two
    for _, change in journal.drain():
        router.take(change)
    assert router.held == {("device", value) for value in HASHES[2:6]}
    assert list(journal.drain()) == []


def test_what_came_and_went_between_two_drains_is_told_once_at_most() -> None:
    pool = BlockPool(1, 4)
    journal = _journal(pool)
    journal.router_joined("r")
    list(journal.drain())
    _fill(pool, HASHES[:1])
    _fill(pool, HASHES[1:2])
    _fill(pool, HASHES[:1])
    [(_, change)] = journal.drain()
    assert (change.stored, change.evicted) == (HASHES[0], HASHES[1])


def test_every_router_has_numbers_of_its_own() -> None:
    pool = BlockPool(8, 4)
    journal = _journal(pool)
    journal.router_joined("a")
    list(journal.drain())
    _fill(pool, HASHES[:1])
    journal.router_joined("b")
    told = list(journal.drain())
    assert [(who, change.seq) for who, change in told] == [("a", 1), ("b", 0), ("b", 1)]
    journal.router_left("a")
    _fill(pool, HASHES[1:2])
    assert [(who, change.seq) for who, change in journal.drain()] == [("b", 2)]


def test_more_changes_than_are_kept_tell_everything_anew() -> None:
    pool = BlockPool(3, 4)
    journal = _journal(pool, max_changes=4)
    journal.router_joined("r")
    list(journal.drain())
    _fill(pool, HASHES)
    told = [change for _, change in journal.drain()]
    assert told[0].seq == 0
    router = _Listener()
    for change in told:
        router.take(change)
    assert router.held == {("device", value) for value in pool.published()}


def test_messages_are_bounded() -> None:
    pool = BlockPool(MAX_HASHES + 10, 4)
    journal = _journal(pool)
    journal.router_joined("r")
    list(journal.drain())
    _fill(pool, (n.to_bytes(16, "big") for n in range(MAX_HASHES + 10)))
    sizes = [len(change.stored) // 16 for _, change in journal.drain()]
    assert sizes == [MAX_HASHES, 10]
    journal.router_joined("late")
    sizes = [len(change.stored) // 16 for who, change in journal.drain() if who == "late"]
    assert sizes == [0, MAX_HASHES, 10]


class PoolEvents(RuleBasedStateMachine):
    """Any mix of what is done to a pool, drained now and then to a router that stays and one that comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(5, 4)
        self.journal = _journal(self.pool, max_changes=6)
        self.held: list[list[int]] = []
        self.routers = {"a": _Listener(), "b": _Listener()}
        self.journal.router_joined("a")

    @precondition(lambda self: self.pool.num_free_blocks)
    @rule(count=st.integers(1, 3), first=st.integers(0, 6))
    def compute(self, count: int, first: int) -> None:
        blocks = self.pool.allocate(min(count, self.pool.num_free_blocks))
        for place, block in enumerate(blocks):
            self.pool.publish(block, HASHES[first + place])
        self.held.append(blocks)

    @rule(first=st.integers(0, 8))
    def hit(self, first: int) -> None:
        blocks = self.pool.match_prefix(HASHES[first:])
        self.pool.pin(blocks)
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def fill_anew(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from([blocks for blocks in self.held if blocks]))
        self.pool.forget(blocks[0])

    @rule()
    def join(self) -> None:
        self.journal.router_joined("b")

    @rule()
    def leave(self) -> None:
        self.journal.router_left("b")

    @rule()
    def drain(self) -> None:
        told = list(self.journal.drain())
        for who, change in told:
            self.routers[who].take(change)
        stored = {("device", value) for value in self.pool.published()}
        assert self.routers["a"].held == stored
        if any(who == "b" for who, _ in told):
            assert self.routers["b"].held == stored

    @invariant()
    def books_agree(self) -> None:
        self.pool.check()


TestPoolEvents = pytest.mark.slow(PoolEvents.TestCase)
TestPoolEvents.settings = settings(max_examples=150, stateful_step_count=40)


def test_tiers_are_told_apart() -> None:
    pool = BlockPool(2, 4)
    journal = _journal(pool)
    host: set[bytes] = set(HASHES[:1])
    journal.add_tier("host", lambda: host)
    journal.router_joined("r")
    router = _Listener()
    for _, change in journal.drain():
        router.take(change)
    assert router.held == {("host", HASHES[0])}
    journal.evicted(HASHES[0], "host")
    _fill(pool, HASHES[:1])
    for _, change in journal.drain():
        router.take(change)
    assert router.held == {("device", HASHES[0])}
    assert journals.DEVICE == "device"
