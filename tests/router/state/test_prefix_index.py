"""The index says what a naive model of all workers' caches says, whatever is told in whatever order."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.kvcache.thin import thin_rule, twin, usable
from kvferry.router.state.prefix_index import PrefixIndex
from kvferry.wire.workers import CacheChange

HASHES = [hashlib.blake2b(bytes([n]), digest_size=16).digest() for n in range(12)]
SESSIONS = (1, 2, 7, 40)
TIERS = ("device", "host", "disk")


def _change(seq: int, stored: list[bytes], evicted: list[bytes] | None = None, tier: str = "device") -> CacheChange:
    return CacheChange(seq=seq, stored=b"".join(stored), evicted=b"".join(evicted or []), tier=tier)


def test_a_prompt_matches_as_many_leading_blocks_as_each_session_holds() -> None:
    index = PrefixIndex()
    index.on_change(1, _change(0, HASHES[:4]))
    index.on_change(2, _change(0, HASHES[:2]))
    index.on_change(7, _change(0, HASHES[1:]))
    assert index.match(HASHES) == {1: 4, 2: 2}
    assert index.match(HASHES[:1]) == {1: 1, 2: 1}
    assert index.match(HASHES[5:]) == {7: 7}
    assert index.match([]) == {}


RULE = thin_rule(
    KVCacheSpec(model="m", num_layers=2, num_kv_heads=1, head_dim=8, block_size=4, dtype="float32", windows=(0, 9))
)


@given(st.lists(st.lists(st.sampled_from(["none", "whole", "thin", "both"]), max_size=len(HASHES)), max_size=4))
def test_sessions_can_go_on_from_what_is_whole_as_far_as_windows_reach(told: list[list[str]]) -> None:
    index, expected = PrefixIndex(num_shards=4), {}
    for session, forms in zip(SESSIONS, told, strict=False):
        whole = [HASHES[place] for place, form in enumerate(forms) if form in ("whole", "both")]
        thin = [twin(HASHES[place]) for place, form in enumerate(forms) if form in ("thin", "both")]
        index.on_change(session, _change(0, [*whole, *thin]))
        if names := usable(HASHES, {*whole, *thin}.__contains__, RULE):
            expected[session] = len(names)
    assert index.match(HASHES, RULE) == expected
    assert index.match(HASHES[:2], RULE) == index.match(HASHES[:2]), "of two blocks windows reach all"


def test_what_is_evicted_matches_no_more() -> None:
    index = PrefixIndex()
    index.on_change(1, _change(0, HASHES[:4]))
    index.on_change(1, _change(1, [], [HASHES[2]]))
    assert index.match(HASHES) == {1: 2}
    assert index.num_blocks(1) == len(index) == 3


def test_a_block_is_held_as_long_as_one_tier_has_it() -> None:
    index = PrefixIndex()
    index.on_change(1, _change(0, HASHES[:2]))
    index.on_change(1, _change(1, HASHES[:2], tier="host"))
    index.on_change(1, _change(2, [], HASHES[:2]))
    assert index.match(HASHES) == {1: 2}
    index.on_change(1, _change(3, [], [HASHES[1]], tier="host"))
    assert index.match(HASHES) == {1: 1}
    index.on_change(1, _change(4, [], [HASHES[1]], tier="host"))
    index.on_change(1, _change(5, HASHES[:2], tier="nowhere"))
    assert index.match(HASHES) == {1: 1}


def test_a_gap_drops_a_session_until_it_tells_everything_anew() -> None:
    index = PrefixIndex()
    index.on_change(1, _change(0, HASHES[:4]))
    index.on_change(2, _change(0, HASHES[:3]))
    index.on_change(1, _change(2, HASHES[4:6]))
    index.on_change(1, _change(3, HASHES[6:8]))
    assert index.match(HASHES) == {2: 3}
    assert index.num_gaps == 1
    index.on_change(1, _change(0, HASHES[:1]))
    index.on_change(1, _change(1, [HASHES[1]]))
    assert index.match(HASHES) == {1: 2, 2: 3}


def test_a_session_that_tells_everything_again_has_nothing_of_before() -> None:
    index = PrefixIndex()
    index.on_change(1, _change(0, HASHES[:4]))
    index.on_change(1, _change(0, HASHES[:1]))
    assert index.match(HASHES) == {1: 1}
    assert index.num_blocks(1) == 1


def test_a_hash_that_was_cut_off_ends_the_session() -> None:
    index = PrefixIndex()
    index.on_change(1, _change(0, HASHES[:4]))
    index.on_change(1, CacheChange(seq=1, stored=HASHES[4][:9]))
    assert index.match(HASHES) == {}


def test_a_forgotten_session_leaves_nothing_in_the_table() -> None:
    index = PrefixIndex(num_shards=4)
    for life in range(20):
        index.on_change(life, _change(0, HASHES[life % 5 :]))
        index.on_change(100, _change(life, []))
        index.forget(life)
    for seq in range(20, 24):
        index.on_change(100, _change(seq, []))
    assert len(index) == 0
    assert index.match(HASHES) == {}


class IndexModel(RuleBasedStateMachine):
    """Against a set of (block, tier) for each session."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(num_shards=2)
        self.model: dict[int, set[tuple[bytes, str]]] = {}
        self.seqs: dict[int, int] = {}

    @rule(session=st.sampled_from(SESSIONS), stored=st.lists(st.sampled_from(HASHES), unique=True))
    def begin(self, session: int, stored: list[bytes]) -> None:
        self.index.on_change(session, _change(0, stored))
        self.model[session], self.seqs[session] = {(value, "device") for value in stored}, 1

    @rule(
        session=st.sampled_from(SESSIONS),
        tier=st.sampled_from(TIERS),
        stored=st.lists(st.sampled_from(HASHES)),
        evicted=st.lists(st.sampled_from(HASHES)),
    )
    def change(self, session: int, tier: str, stored: list[bytes], evicted: list[bytes]) -> None:
        seq = self.seqs.get(session, 5)
        self.index.on_change(session, _change(seq, stored, evicted, tier))
        if session in self.model:
            self.seqs[session] = seq + 1
            self.model[session] |= {(value, tier) for value in stored}
            self.model[session] -= {(value, tier) for value in evicted}

    @rule(session=st.sampled_from(SESSIONS), by=st.integers(1, 3))
    def gap(self, session: int, by: int) -> None:
        self.index.on_change(session, _change(self.seqs.get(session, 1) + by, HASHES[:2]))
        self.model.pop(session, None)
        self.seqs.pop(session, None)

    @rule(session=st.sampled_from(SESSIONS))
    def forget(self, session: int) -> None:
        self.index.forget(session)
        self.model.pop(session, None)
        self.seqs.pop(session, None)

    @invariant()
    def agrees(self) -> None:
        for first in range(0, len(HASHES), 3):
            assert self.index.match(HASHES[first:]) == self._naive(HASHES[first:])
        for session in SESSIONS:
            held = {value for value, _ in self.model.get(session, set())}
            assert self.index.num_blocks(session) == len(held)

    def _naive(self, hashes: list[bytes]) -> dict[int, int]:
        found = {}
        for session, blocks in self.model.items():
            held = {value for value, _ in blocks}
            depth = next((n for n, value in enumerate(hashes) if value not in held), len(hashes))
            if depth:
                found[session] = depth
        return found


TestIndexModel = pytest.mark.slow(IndexModel.TestCase)


@given(st.lists(st.integers(0, 11), max_size=40), st.data())
def test_any_number_of_sessions_is_told_apart(order: list[int], data: st.DataObject) -> None:
    index, held = PrefixIndex(num_shards=1), dict[int, int]()
    for session, depth in enumerate(order):
        index.on_change(session, _change(0, HASHES[:depth]))
        held[session] = depth
        if data.draw(st.booleans()):
            index.forget(session)
            del held[session]
    assert index.match(HASHES) == {session: depth for session, depth in held.items() if depth}
