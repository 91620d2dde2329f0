"""Thin blocks share frames: no byte has two owners, nothing is lost, and what is counted as free can be had."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvferry.common.errors import CapacityError
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.kvcache.blocks import BlockPool
from kvferry.kvcache.frame_pool import FramePool, block_pool
from kvferry.kvcache.frames import Frames, frames_of, layer_pages
from kvferry.kvcache.host_slots import SwapPages
from kvferry.kvcache.pages import copy_blocks

PLAIN = KVCacheSpec(model="m", num_layers=6, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
# One layer of three sees everything.
SPEC = msgspec.structs.replace(PLAIN, windows=(5, 5, 0, 5, 5, 0))


def _pages(block: int, stride: int, *, is_thin: bool) -> set[int]:
    """Return all pages of a block, counted through the allocation."""
    frames = frames_of(SPEC)
    layers = [layer for layer in range(SPEC.num_layers) if not (is_thin and SPEC.is_windowed(layer))]
    return {frames.page(layer, block, stride) for layer in layers}


def test_pages_of_layers_with_windows_stand_behind_those_of_layers_without() -> None:
    assert frames_of(SPEC) == Frames(3, (2, 3, 0, 4, 5, 1), 2)
    assert _pages(1, 10, is_thin=False) == {1, 11, 21, 31, 41, 51}
    assert [sorted(_pages(share * 20 + 1, 10, is_thin=True)) for share in range(3)] == [[1, 11], [21, 31], [41, 51]]
    assert frames_of(SPEC).num_frames(7, 4) == 5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"windows": (0, 0, 5, 0, 0, 5)},  # fewer layers with windows than without
        {"windows": (0, 5, 5, 5)},  # a draft model's pages lie behind
        {"windows": (5,) * 6},
    ],
)
def test_other_blocks_lie_as_they_are_numbered(changes: dict[str, tuple[int, ...]]) -> None:
    spec = msgspec.structs.replace(PLAIN, **changes)
    assert frames_of(spec) == Frames(1, tuple(range(6)), 6)
    pages = torch.zeros(6, 4, 2, 2, 4, 8)
    assert layer_pages(pages, spec) is pages and type(block_pool(spec, 4)) is BlockPool


@pytest.mark.parametrize(("windows", "num_shares"), [((), 1), ((5, 0) * 3, 2), (SPEC.windows, 3)])
def test_a_pool_is_made_as_it_is_asked_for(windows: tuple[int, ...], num_shares: int) -> None:
    spec = msgspec.structs.replace(PLAIN, windows=windows)
    for is_enabled in (False, True):
        pool = block_pool(spec, 4, stride=5, enable_prefix_caching=is_enabled)
        assert pool.num_blocks == 4 and pool.num_shares == num_shares and pool.enable_prefix_caching == is_enabled
        assert pool.num_ids == (frames_of(spec).num_ids(5) if num_shares > 1 else 4)


def test_each_layer_is_viewed_with_as_many_blocks_as_it_has_ids() -> None:
    pages = torch.arange(6 * 4).view(6, 4, 1, 1, 1, 1).expand(6, 4, 2, 2, 4, 8).contiguous()
    views = layer_pages(pages, SPEC)
    assert [len(view) for view in views] == [4, 4, 20, 4, 4, 20]
    assert [view[1, 0, 0, 0, 0].item() for view in views] == [9, 13, 1, 17, 21, 5]
    assert views[2][:, 0, 0, 0, 0].tolist() == list(range(20)) and views[5][19, 0, 0, 0, 0] == 23


def test_thin_blocks_are_copied_without_what_others_have_there() -> None:
    pages = torch.rand(6, 4, 2, 2, 4, 8)
    before, slots = pages.clone(), SwapPages(pages, SPEC, 4)
    rows, kept = pages.view(-1, 2, 2, 4, 8), before.view(-1, 2, 2, 4, 8)
    slots.copy([(~9, 0), (~1, 1), (2, 2)], [])  # shares of frame 1, and a whole block
    rows.zero_()
    slots.copy([], [(0, ~19), (1, ~3), (2, 0)])
    changed = {int(row) for row in rows.flatten(1).any(1).nonzero()}
    assert changed == _pages(19, 4, is_thin=True) | _pages(3, 4, is_thin=True) | _pages(0, 4, is_thin=False)
    for there, here in zip(sorted(_pages(9, 4, is_thin=True)), sorted(_pages(19, 4, is_thin=True)), strict=True):
        assert torch.equal(rows[here], kept[there])


def test_a_whole_block_is_copied_into_a_share_without_what_others_have_there() -> None:
    pages = torch.rand(6, 4, 2, 2, 4, 8)
    rows, before = pages.view(-1, 2, 2, 4, 8), pages.clone().view(-1, 2, 2, 4, 8)
    copy_blocks(pages, [(2, ~9), (3, 0)], frames_of(SPEC).num_full)
    changed = {int(row) for row in (rows != before).flatten(1).any(1).nonzero()}
    assert changed == _pages(9, 4, is_thin=True) | _pages(0, 4, is_thin=False)
    for layer in (2, 5):
        there = frames_of(SPEC).page(layer, 9, 4)
        assert torch.equal(rows[there], before[frames_of(SPEC).page(layer, 2, 4)])


def test_a_frame_holds_three_thin_blocks_and_is_whole_again_without_them() -> None:
    pool = FramePool(2, 4, frames_of(SPEC), stride=3)
    thin = pool.allocate(4, 4)
    assert sorted(thin) == [0, 1, 6, 12]
    assert pool.num_free_blocks == 0 and pool.num_needed(2, 2) == 0 and all(pool.is_thin(block) for block in thin)
    with pytest.raises(CapacityError, match="need 1 blocks, 0 of 2 are free"):
        pool.allocate(1)
    first = [block for block in thin if block % 6 == thin[0]]
    assert pool.num_freed_by(thin) == 2 and pool.num_freed_by(thin[:1]) == 0
    pool.free(thin)
    pool.check()
    assert pool.num_free_blocks == 2 and len(first) == 3 and sorted(pool.allocate(2)) == [0, 1]
    assert not pool.is_thin(0)


def test_a_cached_share_beside_one_that_is_held_makes_room_for_thin_blocks_alone() -> None:
    pool = FramePool(1, 4, frames_of(SPEC))
    held, cached = pool.allocate(2, 2)
    pool.publish(cached, b"cached")
    pool.free([cached])
    assert pool.num_free_blocks == 0 and pool.num_needed(2, 2) == 0 and pool.num_needed(3, 3) == 1
    assert pool.num_needed(1, 1, [cached]) == 0 and pool.num_needed(2, 2, [cached]) == 1, "what is found gives no way"
    assert list(pool.coldest()) == [] and pool.block_of(b"cached") == cached
    pool.free([held])
    assert pool.num_free_blocks == 1 and list(pool.coldest()) == [b"cached"]
    pool.pin([cached])
    assert pool.num_free_blocks == 0
    pool.free([cached])
    told = list[bytes]()
    pool.on_evicted = lambda block, name: told.append(name)
    assert pool.allocate(1) == [0] and not pool.knows(b"cached") and not told
    pool.check()


def test_a_thin_block_takes_a_cached_one_s_place_where_a_whole_one_takes_the_last_empty_frame() -> None:
    pool = FramePool(2, 4, frames_of(SPEC))
    *held, cached = pool.allocate(3, 3)
    pool.publish(cached, b"cached")
    pool.free([cached])
    assert pool.num_free_blocks == 1 and pool.num_needed(1, 1) == pool.num_needed(2, 1) == 1
    thin, whole = pool.allocate(2, 1)
    assert thin == cached and not pool.is_thin(whole) and not pool.knows(b"cached")
    pool.free([*held, thin, whole])
    pool.check()


def test_thin_blocks_take_the_place_of_the_oldest_cached_one_where_no_frame_is_empty() -> None:
    pool, told = FramePool(2, 4, frames_of(SPEC)), list[tuple[int, bytes]]()
    pool.on_evicted = lambda block, name: told.append((block, name))
    held, *cached = pool.allocate(3, 3)
    for block, name in zip(cached, (b"old", b"new"), strict=True):
        pool.publish(block, name)
        pool.free([block])
    in_empty = pool.allocate(3, 3)
    assert not told and pool.knows(b"old")
    assert pool.allocate(1, 1) == cached[:1] and told == [(cached[0], b"old")] and pool.knows(b"new")
    pool.free([held, *in_empty, cached[0]])
    pool.check()


class _Listener:
    def __init__(self) -> None:
        self.held: set[bytes] = set()

    def stored(self, block_hash: bytes) -> None:
        self.held.add(block_hash)

    def evicted(self, block_hash: bytes) -> None:
        self.held.remove(block_hash)


def test_whole_blocks_are_evicted_by_age_and_spare_ones_before_them_untold() -> None:
    pool, told = FramePool(3, 4, frames_of(SPEC)), list[tuple[int, bytes]]()
    pool.on_evicted = lambda block, name: told.append((block, name))
    pool.listener = listener = _Listener()
    old, new, spare = pool.allocate(3)
    for block, name in ((old, b"old"), (new, b"new"), (spare, b"spare")):
        pool.publish(block, name, spare=block == spare)
        pool.free([block])
    assert pool.version == 3 and listener.held == {b"old", b"new", b"spare"}
    pool.pin([new])
    assert pool.version == 4
    pool.free([new])
    assert [pool.allocate(1) for _ in range(3)] == [[spare], [old], [new]]
    assert told == [(old, b"old"), (new, b"new")] and pool.version == 8 and not listener.held


def test_what_is_lost_is_told_where_its_bytes_are_its_heirs_to_copy() -> None:
    pool, told = FramePool(1, 4, frames_of(SPEC)), list[tuple[int, bytes]]()
    pool.on_evicted = lambda block, name: told.append((block, name))

    def keep(blocks: list[int], names: list[bytes]) -> None:
        for block, name in zip(blocks, names, strict=True):
            pool.publish(block, name)
        pool.free(blocks)

    keep(pool.allocate(1), [b"whole"])
    keep(pool.allocate(3, 3), [b"thin 0", b"thin 1", b"thin 2"])
    assert not told, "of three thin blocks none has all that the whole one had"
    first = pool.match_prefix([b"thin 0"])
    assert pool.allocate(1) == [0] and told == [(first[0], b"thin 0")] == [(0, b"thin 0")]


class Frameworks(RuleBasedStateMachine):
    """A pool beside a plain book of who owns which page."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = FramePool(4, 4, frames_of(SPEC), stride=5)
        self.owned: list[list[int]] = []  # lists of blocks, each with a reference to each of its own
        self.thin: dict[int, bool] = {}  # of blocks that are owned or found
        self.quarantined: list[int] = []
        self.names: dict[bytes, int] = {}
        self.count = 0

    def _take(self, blocks: Iterable[int], num_thin: int) -> None:
        blocks = list(blocks)
        for place, block in enumerate(blocks):
            assert self.pool.is_thin(block) == (place < num_thin)
            self.thin[block] = place < num_thin
        if blocks:
            self.owned.append(blocks)

    @rule(count=st.integers(0, 5), data=st.data())
    def allocate(self, count: int, data: st.DataObject) -> None:
        num_thin = data.draw(st.integers(0, count))
        needed, free = self.pool.num_needed(count, num_thin), self.pool.num_free_blocks
        if needed > free:
            with pytest.raises(CapacityError):
                self.pool.allocate(count, num_thin)
            return
        self._take(self.pool.allocate(count, num_thin), num_thin)
        assert self.pool.num_free_blocks == free - needed
        self._forget_evicted()

    def _forget_evicted(self) -> None:
        self.names = {name: block for name, block in self.names.items() if self.pool.knows(name)}

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), is_spare=st.booleans())
    def publish(self, data: st.DataObject, is_spare: bool) -> None:
        block = data.draw(st.sampled_from(sorted({block for blocks in self.owned for block in blocks})))
        if not self.pool.is_published(block):
            self.count += 1
            name = self.count.to_bytes(4, "big")
            self.pool.publish(block, name, spare=is_spare)
            self.names[name] = block

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def find(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.names)))
        block = self.pool.block_of(name)
        assert block == self.names[name]
        before, taken = self.pool.num_free_blocks, self.pool.num_evictable([block])
        self.pool.pin([block])
        assert self.pool.num_free_blocks == before - taken
        self.owned.append([block])

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        blocks = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        before, freed = self.pool.num_free_blocks, self.pool.num_freed_by(blocks)
        is_leaving = any(block in self.pool._leaving for block in blocks)
        self.pool.free(blocks)
        assert is_leaving or self.pool.num_free_blocks == before + freed

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.owned) - 1))
        blocks = self.owned[place]
        if all(self.pool.ref_count(block) == 1 and not self.pool.is_published(block) for block in blocks):
            del self.owned[place]
            self.pool.quarantine(blocks)
            self.quarantined += blocks

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        """What was whole is thin from now on, where it lies."""
        block = data.draw(st.sampled_from(sorted({block for blocks in self.owned for block in blocks})))
        if self.pool.ref_count(block) == 1 and not self.thin[block] and block not in self.pool._leaving:
            self.names = {name: other for name, other in self.names.items() if other != block}
            self.pool.forget(block)
            before = self.pool.num_free_blocks
            self.pool.cut(block)
            self.thin[block] = True
            assert self.pool.num_free_blocks == before and self.pool.has_free_share
            assert self.pool.num_needed(2, 2) == 0

    @rule()
    def release(self) -> None:
        self.pool.release_quarantine(self.quarantined)
        self.quarantined = []

    @rule(count=st.integers(1, 4))
    def copy_out(self, count: int) -> None:
        names = [name for name, _ in zip(self.pool.coldest(), range(count), strict=False)]
        if not self.pool._leaving:
            self.pool.hold([block for name in names if (block := self.pool.cached_block(name)) is not None])

    @rule()
    def copied(self) -> None:
        self.pool.unhold()

    @invariant()
    def books_agree(self) -> None:
        self.pool.check()
        references = [block for blocks in self.owned for block in blocks]
        assert all(self.pool.ref_count(block) == references.count(block) for block in range(self.pool.num_ids))
        owned, leaving, quarantined, published = (
            {block % 10 for block in blocks}  # their frames
            for blocks in (references, self.pool._leaving, self.quarantined, self.names.values())
        )
        assert self.pool.num_owned_blocks == len(owned)
        assert self.pool.num_leaving_blocks == len(leaving - owned)
        cached = published - owned - leaving - quarantined
        assert self.pool.num_cached_blocks == len(cached) + len(leaving - owned)

    @invariant()
    def no_page_has_two_owners(self) -> None:
        live = {block for blocks in self.owned for block in blocks} | set(self.quarantined) | set(self.names.values())
        pages = [page for block in live for page in _pages(block, 5, is_thin=self.thin[block])]
        assert len(pages) == len(set(pages))

    @invariant()
    def what_is_published_is_found(self) -> None:
        for name, block in self.names.items():
            assert self.pool.block_of(name) == block and self.pool.is_thin(block) == self.thin[block]


TestFramePool = Frameworks.TestCase
