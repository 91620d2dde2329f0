"""A tier's slots: what is found is what was filled in, the least recently used goes first, what is read stays."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.kvcache.tiers import Lookahead, TierIndex


def _key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def _filled(index: TierIndex, *numbers: int) -> None:
    for number in numbers:
        assert index.reserve(_key(number)) is not None
        index.fill(_key(number))


def _held(index: TierIndex) -> list[int]:
    return [int.from_bytes(known, "little") for known in index]


class _Told:
    def __init__(self) -> None:
        self.stored_now: set[bytes] = set()

    def stored(self, block_hash: bytes, tier: str) -> None:
        assert tier == "host" and block_hash not in self.stored_now
        self.stored_now.add(block_hash)

    def evicted(self, block_hash: bytes, tier: str) -> None:
        assert tier == "host"
        self.stored_now.remove(block_hash)


def test_a_slot_is_found_once_it_is_filled() -> None:
    index = TierIndex(2, first_slot=5)
    slot = index.reserve(_key(1))
    assert slot in (5, 6) and index.find(_key(1)) is None and _key(1) in index
    index.fill(_key(1))
    assert index.find(_key(1)) == slot
    other = index.reserve(_key(2))
    index.discard(_key(2))
    assert _key(2) not in index and index.reserve(_key(3)) == other


class _Counted(int):
    """A slot that counts how often one is compared."""

    num_compared = 0

    def __eq__(self, other: object) -> bool:
        _Counted.num_compared += 1
        return int(self) == other

    __hash__ = int.__hash__


def test_what_slots_held_before_is_found_in_work_that_grows_with_its_number() -> None:
    index = TierIndex(2000)
    index.restore([(_key(number), _Counted(number)) for number in range(0, 2000, 2)])
    assert _Counted.num_compared <= 4000
    assert index.find(_key(6)) == 6 and index.find(_key(7)) is None
    assert (len(index), index.num_free) == (1000, 1000)
    index.check()
    assert index.reserve(_key(7)) == 1


def test_the_least_recently_used_is_evicted_and_what_is_read_is_passed_over() -> None:
    index = TierIndex(3)
    _filled(index, 1, 2, 3)
    index.keep_longest(_key(1))
    assert _held(index) == [2, 3, 1]
    index.pin(_key(2))
    _filled(index, 4)
    assert _held(index) == [2, 1, 4]
    index.keep_shortest(_key(4))
    _filled(index, 5)
    assert _held(index) == [2, 1, 5]
    for number in (1, 5):
        index.pin(_key(number))
    assert index.reserve(_key(6)) is None, "all are being read"
    index.unpin(_key(2))
    assert index.reserve(_key(6)) is not None


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_slots=st.integers(0, 6))
def test_no_slot_is_lost_and_a_block_keeps_the_slot_that_it_was_filled_into(seed: int, num_slots: int) -> None:
    random, index, told = Random(seed), TierIndex(num_slots, 3), _Told()
    index.report_to(told, "host")
    filling: dict[bytes, int] = {}
    content: dict[int, bytes] = {}
    pinned: list[bytes] = []
    for _ in range(300):
        key = _key(random.randint(0, 10))
        action = random.randint(0, 5)
        if action == 0 and key not in index and (slot := index.reserve(key)) is not None:
            assert slot not in filling.values() and content.get(slot) not in pinned
            filling[key] = slot
            content.pop(slot, None)
        elif action == 1 and filling:
            key = random.choice(list(filling))
            content[filling.pop(key)] = key
            index.fill(key)
        elif action == 2 and key in index and key not in pinned:
            if key in filling:
                del filling[key]
            else:
                del content[index.find(key) or 0]
            index.discard(key)
        elif action == 3 and key in index and key not in filling:
            index.pin(key)
            pinned.append(key)
        elif action == 4 and pinned:
            index.unpin(pinned.pop())
        elif action == 5:
            random.choice([index.keep_longest, index.keep_shortest])(key)
        index.check()
        found = {slot: known for known in index if (slot := index.find(known)) is not None}
        assert found == content
        assert told.stored_now == set(content.values())


def test_a_lookahead_names_the_next_ones_that_are_not_kept_and_looks_again_after_half_has_changed() -> None:
    lookahead, kept = Lookahead(), {_key(2)}
    order = [_key(number) for number in range(1, 9)]

    def take(count: int, version: int) -> list[bytes]:
        return lookahead.take(count, order=order, window=4, version=version, is_kept=kept.__contains__)

    assert take(2, 10) == [_key(1), _key(3)]
    assert take(2, 11) == [_key(4)]
    assert take(2, 12) == []
    order.pop(0)
    assert take(9, 13) == [_key(3), _key(4), _key(5)]
    for window, names in ((4, []), (5, [_key(3), _key(4), _key(5), _key(6)])):
        lookahead.look(order, window=window, version=13, is_kept=kept.__contains__)
        assert take(9, 13) == names, "what was seen is not looked at again, and what lies behind it is"
    order.clear()
    lookahead.look(order, window=4, version=14, is_kept=kept.__contains__)
    assert take(1, 15) == [] and lookahead.take(1, order=order, window=0, version=99, is_kept=kept.__contains__) == []
