"""What routers are told adds up to what the pool and its tiers hold, whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvferry.kvcache import journal as journals
from kvferry.kvcache.blocks import BlockPool, hash_blocks
from kvferry.kvcache.journal import MAX_HASHES, CacheJournal, _Session
from kvferry.router.state.prefix_index import PrefixIndex
from kvferry.wire.codec import encode
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
    journal = _journal(pool, max_changes=3)
    journal.router_joined("r")
    list(journal.drain())
    _fill(pool, HASHES[:3])
    assert [change.seq for _, change in journal.drain()] == [1]
    _fill(pool, HASHES[3:5])  # evicts two
    told = [change for _, change in journal.drain()]
    assert told[0].seq == 0
    _fill(pool, HASHES[5:6])
    told += (change for _, change in journal.drain())
    assert [change.seq for change in told] == [0, 1, 2]
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


def test_a_large_cache_is_told_in_parts_and_what_changes_meanwhile_before_them() -> None:
    """A block that goes before its turn is not told of any more, and one that comes is told of at once."""
    pool = BlockPool(6, 4)
    journal = _journal(pool, max_told=2)
    _fill(pool, HASHES[:6])
    journal.router_joined("r")
    router = _Listener()

    def drain() -> set[bytes]:
        before = set(router.held)
        for _, change in journal.drain():
            router.take(change)
        assert router.held <= {("device", value) for value in pool.published()}, "what is not there"
        return {value for _, value in router.held - before}

    assert drain() == set(HASHES[:2])
    _fill(pool, HASHES[6:9])  # evicts the first three
    assert drain() == {*HASHES[6:9], HASHES[3]}
    _fill(pool, HASHES[:1])  # evicts the fourth, comes back
    assert drain() == {HASHES[0], HASHES[4], HASHES[5]}
    assert router.held == {("device", value) for value in pool.published()}
    assert not drain() and not list(journal.drain())
    assert journal._sessions == {"r": _Session(next_seq=6)}, "no memory of what was told in parts"


def test_no_drain_has_more_than_a_session_can_queue() -> None:
    """Else a session ends by what its worker says at its begin, as does the next, for ever."""
    journal = CacheJournal()
    stored = [number.to_bytes(16, "big") for number in range(150_000)]
    journal.add_tier("disk", lambda: stored)
    journal.router_joined("r")
    sizes = []
    while told := list(journal.drain()):
        sizes.append(sum(len(encode(change)) for _, change in told))
        if len(sizes) == 2:
            journal.router_joined("late")  # does not begin the other's anew
    assert len(sizes) == 5 and max(sizes) < 5 << 19
    assert sum(sizes) == pytest.approx(2 * 16 * len(stored), rel=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_a_router_s_index_holds_what_the_tiers_do_though_changes_come_before_what_they_are_about(seed: int) -> None:
    random = Random(seed)
    tiers: dict[str, set[bytes]] = {tier: set(random.sample(HASHES, 5)) for tier in ("device", "host", "disk")}
    journal, index = CacheJournal(max_told=random.randint(1, 3)), PrefixIndex(num_shards=4)
    for tier, held in tiers.items():
        journal.add_tier(tier, held.copy)
    journal.router_joined("r")
    for round_number in range(30):
        for _, change in journal.drain():
            assert change.stored or change.evicted or change.seq == 0
            index.on_change(1, change)
        found = {value for value in HASHES if index.match([value])}
        assert found <= set().union(*tiers.values())
        if round_number < 12:
            tier, value = random.choice(list(tiers)), random.choice(HASHES)
            is_held = value in tiers[tier]
            (tiers[tier].discard if is_held else tiers[tier].add)(value)
            (journal.evicted if is_held else journal.stored)(value, tier)
    assert found == set().union(*tiers.values()) and index.num_gaps == 0
    assert index.num_blocks(1) == len(found)


class PoolEvents(RuleBasedStateMachine):
    """Any mix of what is done to a pool, drained now and then to a router that stays and one that comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(5, 4)
        self.held: list[list[int]] = []
        self.routers = {"a": _Listener(), "b": _Listener()}

    @initialize(max_told=st.sampled_from([1, 2, 100]))
    def begin(self, max_told: int) -> None:
        self.max_told = max_told
        self.journal = _journal(self.pool, max_changes=6, max_told=max_told)
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
        for who in {"a", *(who for who, _ in told)}:
            held = self.routers[who].held
            assert held == stored if self.max_told == 100 else held <= stored

    def teardown(self) -> None:
        """Nothing changes any more: after so many parts all is told."""
        for _ in range(self.pool.num_blocks + 1):
            for who, change in self.journal.drain():
                self.routers[who].take(change)
        assert self.routers["a"].held == {("device", value) for value in self.pool.published()}

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
