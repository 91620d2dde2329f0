"""The block pool keeps its books whatever is asked of it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvferry.common.errors import CapacityError
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.kvcache.blocks import BlockPool, hash_blocks, prefix_salt

SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=4, head_dim=8, block_size=4, dtype="float32")


def test_equal_prefixes_have_equal_hashes_and_other_salts_have_others() -> None:
    one = hash_blocks(list(range(12)), 4, b"tenant-a")
    assert one == hash_blocks([*range(8), 8, 9, 10, 11, 12], 4, b"tenant-a")
    assert hash_blocks([*range(8), 0, 0, 0, 0], 4, b"tenant-a")[:2] == one[:2]
    assert not set(one) & set(hash_blocks(list(range(12)), 4, b"tenant-b"))


def test_a_salt_tells_tenants_and_adapters_apart() -> None:
    assert prefix_salt(SPEC, b"t") == SPEC.fingerprint.encode() + b"\0t"  # as it was without adapters
    salts = [prefix_salt(SPEC, salt, adapter) for salt in (b"", b"0a", b"+0a") for adapter in ("", "0a", "0a0a")]
    assert len(set(salts)) == len(salts) == 9
    assert SPEC.fingerprint.isalnum() and len(SPEC.fingerprint) == 16


def test_a_hash_covers_everything_before_its_block() -> None:
    assert hash_blocks([1, 2, 3, 4, 5, 6, 7, 8], 4, b"")[1] != hash_blocks([0, 2, 3, 4, 5, 6, 7, 8], 4, b"")[1]


def test_hashing_goes_on_from_known_hashes() -> None:
    tokens = list(range(40))
    assert hash_blocks(tokens, 4, b"s", hash_blocks(tokens[:16], 4, b"s")) == hash_blocks(tokens, 4, b"s")


def test_page_and_block_bytes_count_keys_and_values_of_the_rank() -> None:
    assert SPEC.page_bytes() == 2 * 4 * 4 * 8 * 4
    assert SPEC.page_bytes(tp_size=2) * 2 == SPEC.page_bytes()
    assert SPEC.block_bytes() == 2 * SPEC.page_bytes()


def test_too_many_blocks_are_refused_with_the_numbers_and_nothing_is_taken() -> None:
    pool = BlockPool(4, 4)
    with pytest.raises(CapacityError, match="need 5 blocks, 4 of 4"):
        pool.allocate(5)
    assert pool.num_free_blocks == 4


def test_published_blocks_are_found_until_they_are_evicted_least_recently_used_first() -> None:
    pool = BlockPool(4, 4)
    first, second = hash_blocks([1] * 4, 4, b""), hash_blocks([2] * 4, 4, b"")
    for value in (first, second):
        blocks = pool.allocate(1)
        pool.publish(blocks[0], value[0])
        pool.free(blocks)
    hit = pool.match_prefix(first)
    pool.pin(hit)  # used again: now the second is the older one
    pool.free(hit)
    pool.allocate(3)
    assert pool.match_prefix(first) and not pool.match_prefix(second)
    pool.check()


def test_the_tail_of_a_sequence_is_evicted_before_its_head() -> None:
    pool = BlockPool(3, 4)
    hashes = hash_blocks(list(range(12)), 4, b"")
    blocks = pool.allocate(3)
    for block, value in zip(blocks, hashes, strict=True):
        pool.publish(block, value)
    pool.free(blocks)
    pool.allocate(1)
    assert pool.match_prefix(hashes) == blocks[:2]


def test_a_shared_block_stays_until_its_last_holder_frees_it() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    pool.pin(blocks)
    pool.free(blocks)
    assert pool.num_free_blocks == 1
    pool.free(blocks)
    assert pool.num_free_blocks == 2
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


def test_of_two_blocks_with_the_same_content_the_first_stays_known() -> None:
    pool = BlockPool(2, 4)
    hashes = hash_blocks([7] * 4, 4, b"")
    first, second = pool.allocate(2)
    pool.publish(first, hashes[0])
    pool.publish(second, hashes[0])
    assert pool.match_prefix(hashes) == [first]
    pool.free([second])
    assert pool.match_prefix(hashes) == [first]
    pool.check()


class Heard:
    """Implements `CacheListener`."""

    def __init__(self) -> None:
        self.found: list[bytes] = []

    def stored(self, block_hash: bytes) -> None:
        self.found.append(block_hash)

    def evicted(self, block_hash: bytes) -> None:
        self.found.remove(block_hash)


def test_whoever_listens_hears_of_what_is_found_no_more() -> None:
    pool = BlockPool(2, 4)
    pool.listener = heard = Heard()
    [block] = pool.allocate(1)
    pool.publish(block, b"first", spare=True)
    pool.publish(block, b"second")
    assert heard.found == [b"first"], "it has one content"
    pool.check()
    pool.forget(block)
    pool.check()
    assert heard.found == [] and not pool.is_spare(block)
    pool.publish(block, b"third")
    pool.free([block])
    pool.allocate(2)
    assert heard.found == []


def test_a_block_that_is_leaving_counts_as_cached_and_is_nobodys() -> None:
    pool = BlockPool(2, 4)
    [block] = pool.allocate(1)
    pool.publish(block, b"x")
    pool.free([block])
    pool.hold([block])
    assert (pool.num_free_blocks, pool.num_cached_blocks, pool.num_owned_blocks) == (1, 1, 0)
    pool.unhold()
    assert (pool.num_free_blocks, pool.num_cached_blocks, pool.num_owned_blocks) == (2, 1, 0)


def test_quarantined_blocks_are_out_of_use_until_released() -> None:
    pool = BlockPool(3, 4)
    blocks = pool.allocate(2)
    pool.quarantine(blocks)
    assert (pool.num_free_blocks, pool.num_quarantined_blocks, pool.num_owned_blocks) == (1, 2, 0)
    with pytest.raises(CapacityError):
        pool.allocate(2)
    pool.release_quarantine(blocks)
    assert pool.num_free_blocks == 3
    pool.check()


def test_without_prefix_caching_nothing_is_found() -> None:
    pool = BlockPool(2, 4, enable_prefix_caching=False)
    blocks = pool.allocate(1)
    hashes = hash_blocks([1] * 4, 4, b"")
    pool.publish(blocks[0], hashes[0])
    assert pool.match_prefix(hashes) == []


class PoolMachine(RuleBasedStateMachine):
    """Holders allocate, share, publish, free and quarantine at random; the books must balance after each rule."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, 4)
        self.holders: list[list[int]] = []
        self.quarantined: list[int] = []
        self.hashes = hash_blocks([value for value in range(8) for _ in range(4)], 4, b"")

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        if count <= self.pool.num_free_blocks:
            self.holders.append(self.pool.allocate(count))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from([h for h in self.holders if h]))
        self.pool.pin(blocks)
        self.holders.append(list(blocks))

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data(), index=st.integers(0, 7))
    def publish(self, data: st.DataObject, index: int) -> None:
        block = data.draw(st.sampled_from([h for h in self.holders if h]))[0]
        self.pool.publish(block, self.hashes[index])

    @rule()
    def hit(self) -> None:
        blocks = self.pool.match_prefix(self.hashes)
        self.pool.pin(blocks)
        self.holders.append(blocks)

    @rule()
    def quarantine(self) -> None:
        if self.pool.num_free_blocks:
            blocks = self.pool.allocate(1)
            self.pool.quarantine(blocks)
            self.quarantined += blocks

    @precondition(lambda self: self.quarantined)
    @rule()
    def release(self) -> None:
        self.pool.release_quarantine([self.quarantined.pop()])

    @invariant()
    def books_balance(self) -> None:
        self.pool.check()
        owned = {block for holder in self.holders for block in holder}
        assert self.pool.num_owned_blocks == len(owned)
        assert self.pool.num_quarantined_blocks == len(self.quarantined)
        for block in owned:
            assert self.pool.ref_count(block) == sum(block in holder for holder in self.holders)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = pytest.mark.slow(PoolMachine.TestCase)


def test_what_another_worker_keeps_is_evicted_first_and_goes_to_no_other_tier() -> None:
    pool, evicted = BlockPool(4, 4), list[bytes]()
    pool.on_evicted = lambda _, block_hash: evicted.append(block_hash)
    kept, spare = pool.allocate(2), pool.allocate(2)
    for number, block in enumerate(kept):
        pool.publish(block, b"kept-%d" % number)
    for number, block in enumerate(spare):
        pool.publish(block, b"spare-%d" % number, spare=True)
    pool.free(kept)
    pool.free(spare)
    pool.check()
    assert pool.num_free_blocks == pool.num_cached_blocks == 4 and list(pool.coldest()) == [b"kept-1", b"kept-0"]
    assert pool.match_prefix([b"spare-0", b"spare-1"]) == spare
    assert pool.allocate(2) == [spare[1], spare[0]] and not evicted
    assert pool.allocate(1) == [kept[1]] and evicted == [b"kept-1"]
    pool.check()


def test_a_spare_block_that_is_kept_after_all_is_evicted_in_its_turn() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(2)
    pool.publish(blocks[0], b"a", spare=True)
    pool.publish(blocks[1], b"b")
    pool.free([blocks[1]])
    pool.keep([blocks[0]])
    pool.free([blocks[0]])
    pool.check()
    assert pool.allocate(1) == [blocks[1]]
