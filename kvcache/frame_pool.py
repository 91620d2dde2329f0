"""A block pool where thin blocks share frames (`frames.py`): what it counts is frames, each the memory of a whole one.

    a frame is      empty     nobody's
                    whole     one block's, whose id is the frame's
                    cut       thin blocks', the first of which has the frame's id, too
    and available   while nobody holds what lies in it: then a whole block may take it, and what it keeps is evicted

In a cut frame of which something is held the other shares are spare: free ones, where thin blocks go first, and `stuck`
ones, cached blocks that only another thin block may take the place of, once no frame is empty.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from ..common.errors import CapacityError
from ..common.kv_spec import KVCacheSpec
from ..common.request import BlockId
from .blocks import BlockPool
from .frames import Frames, frames_of


def block_pool(
    spec: KVCacheSpec, num_blocks: int, *, stride: int | None = None, enable_prefix_caching: bool = True
) -> BlockPool:
    """Make the pool of an allocation with these contents. `stride`: its blocks, with spare ones; None: no more."""
    frames = frames_of(spec)
    if frames.num_shares == 1:
        return BlockPool(num_blocks, spec.block_size, enable_prefix_caching=enable_prefix_caching)
    return FramePool(num_blocks, spec.block_size, frames, stride=stride, enable_prefix_caching=enable_prefix_caching)


class FramePool(BlockPool):
    """`num_blocks`, `num_free_blocks` and the like count frames; what is handed out are ids of blocks."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        frames: Frames,
        *,
        stride: int | None = None,
        enable_prefix_caching: bool = True,
    ) -> None:
        super().__init__(num_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
        self._frames = frames
        self.num_shares = frames.num_shares
        stride = num_blocks if stride is None else stride
        self._step, self.num_ids = frames.step(stride), frames.num_ids(stride)
        self._ref_counts = [0] * self.num_ids
        self._num_held = [0] * num_blocks  # blocks of a frame that are owned, leaving or in quarantine
        self._cut: dict[BlockId, list[BlockId]] = {}  # by frame: its free shares
        self._open: dict[BlockId, None] = {}  # cut frames of which something is held and something is free
        self._stuck: OrderedDict[BlockId, None] = OrderedDict()  # least recently used first
        self._num_available = num_blocks
        self._num_spare_shares = 0

    def _frame(self, block: BlockId) -> BlockId:
        return block % self._step

    def _shares(self, frame: BlockId) -> range:
        return range(frame, self.num_ids, self._step)

    def is_thin(self, block: BlockId) -> bool:
        return self._frame(block) in self._cut

    # --- counts ------------------------------------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        return self._num_available

    @property
    def num_cached_blocks(self) -> int:
        return self._num_available - len(self._free) + self.num_leaving_blocks

    @property
    def num_leaving_blocks(self) -> int:
        frames = {self._frame(block) for block in self._leaving}
        return sum(not any(self._ref_counts[share] for share in self._shares(frame)) for frame in frames)

    @property
    def num_owned_blocks(self) -> int:
        return len({self._frame(block) for block, count in enumerate(self._ref_counts) if count})

    def num_needed(self, count: int, num_thin: int = 0, hits: Iterable[BlockId] = ()) -> int:
        if not num_thin:
            return count
        num_whole, num_stuck = count - num_thin, len(self._stuck)
        without_free = num_thin - (self._num_spare_shares - num_stuck)
        num_empty = max(0, min(len(self._free) - num_whole, self._frames_of(without_free)))
        num_stuck -= sum(block in self._stuck for block in hits)
        num_cut = self._frames_of(without_free - num_empty * self.num_shares - num_stuck)
        return num_whole + num_empty + num_cut

    def _frames_of(self, num_thin: int) -> int:
        return -(-max(0, num_thin) // self.num_shares)

    def num_frames(self, count: int, num_thin: int) -> int:
        return self._frames.num_frames(count, num_thin)

    def num_freed_by(self, blocks: Iterable[BlockId]) -> int:
        of_frame = Counter(self._frame(block) for block in blocks if self._ref_counts[block] == 1)
        return sum(count == self._num_held[frame] for frame, count in of_frame.items())

    def num_evictable(self, blocks: Iterable[BlockId]) -> int:
        return len({self._frame(block) for block in blocks if block in self._cached or block in self._resting})

    # --- taking ------------------------------------------------------------------------------------------------------

    def allocate(self, count: int, num_thin: int = 0) -> list[BlockId]:
        needed = self.num_needed(count, num_thin)
        if needed > self._num_available:
            raise CapacityError(f"need {needed} blocks, {self._num_available} of {self.num_blocks} are free")
        whole = [self._take(self._take_frame()) for _ in range(count - num_thin)]
        return [self._take(self._take_share()) for _ in range(num_thin)] + whole

    @property
    def has_free_share(self) -> bool:
        """Tell whether a thin block would lie beside another."""
        return bool(self._open)

    def cut(self, block: BlockId) -> None:
        """Let other thin blocks lie beside this one, which was whole and unpublished and has one owner."""
        assert self._ref_counts[block] == 1 and block not in self._hash_of and block not in self._leaving, block
        self._cut[block] = [share for share in reversed(self._shares(block)) if share != block]
        self._open[block] = None
        self._num_spare_shares += self.num_shares - 1

    def _take(self, block: BlockId) -> BlockId:
        assert self._ref_counts[block] == 0, block
        self._ref_counts[block] = 1
        self._hold(block)
        return block

    def _take_frame(self, *, is_whole: bool = True) -> BlockId:
        """Return an empty frame; evict what is in the one that was not used for the longest, if it must."""
        if self._free:
            return self._free.pop()
        block = next(iter(self._resting or self._cached))
        frame = self._frame(block)
        for share in self._shares(frame):
            if share in self._hash_of:
                # Other shares' bytes are not its next owner's to copy, nor what a share lacks of a whole block's.
                self._lose(share, is_told=share == frame and (is_whole or frame in self._cut))
        self._cut.pop(frame, None)
        return frame

    def _take_share(self) -> BlockId:
        if self._open:
            frame = next(reversed(self._open))
            share = self._cut[frame].pop()
            if not self._cut[frame]:
                del self._open[frame]
            return share
        if self._stuck and not self._free:
            share = next(iter(self._stuck))
            self._lose(share, is_told=True)
            return share
        frame = self._take_frame(is_whole=False)
        self._cut[frame] = [share for share in reversed(self._shares(frame)) if share != frame]
        return frame

    def _lose(self, block: BlockId, *, is_told: bool) -> None:
        """Unpublish a cached block, whose memory is taken."""
        is_spare = block in self._spare
        for order in (self._resting, self._cached, self._stuck):
            order.pop(block, None)
        block_hash = self._hash_of.pop(block)
        del self._block_of[block_hash]
        self._spare.discard(block)
        self.version += 1
        if is_told and self.on_evicted is not None and not is_spare:
            self.on_evicted(block, block_hash)
        self.listener.evicted(block_hash)

    # --- holding -----------------------------------------------------------------------------------------------------

    def _hold(self, block: BlockId) -> None:
        """Count a block that is held from now on, and was not."""
        frame = self._frame(block)
        self._num_held[frame] += 1
        is_first, free = self._num_held[frame] == 1, self._cut.get(frame)
        self._num_available -= is_first
        if free is None:
            return
        self._num_spare_shares += self.num_shares - 1 if is_first else -1
        if is_first:
            for share in self._shares(frame):
                if share in self._cached or share in self._resting:
                    self._remove(share)
                    self._stuck[share] = None
            if free:
                self._open[frame] = None

    def _unhold(self, block: BlockId) -> None:
        """Count a block that is held no more. What is stuck beside it is evictable with the last one."""
        frame = self._frame(block)
        self._num_held[frame] -= 1
        is_last = not self._num_held[frame]
        self._num_available += is_last
        if frame not in self._cut:
            return
        self._num_spare_shares -= self.num_shares - 1 if is_last else -1
        if is_last:
            self._open.pop(frame, None)
            for share in self._shares(frame):
                if share in self._stuck:
                    del self._stuck[share]
                    (self._resting if share in self._spare else self._cached)[share] = None

    def _remove(self, block: BlockId) -> None:
        """Take a cached block out of the order of eviction."""
        del (self._resting if block in self._resting else self._cached if block in self._cached else self._stuck)[block]

    def pin(self, blocks: Iterable[BlockId]) -> None:
        for block in blocks:
            if self._ref_counts[block] == 0:
                if block not in self._leaving:
                    self._remove(block)
                    self._hold(block)
                self.version += 1
            self._ref_counts[block] += 1

    def _rest(self, block: BlockId) -> None:
        frame = self._frame(block)
        self._unhold(block)
        free = self._cut.get(frame)
        if block in self._hash_of:
            resting = self._resting if block in self._spare else self._cached
            (self._stuck if self._num_held[frame] else resting)[block] = None
            self.version += 1
        elif free is None:
            self._free.append(block)
        else:
            free.append(block)
            if self._num_held[frame]:
                self._open[frame] = None
            elif len(free) == self.num_shares:
                del self._cut[frame]
                self._free.append(frame)

    # --- copies to other tiers ---------------------------------------------------------------------------------------

    def hold(self, blocks: Iterable[BlockId]) -> None:
        for block in blocks:
            self._remove(block)
            self._leaving[block] = None
            self._hold(block)

    def unhold(self) -> None:
        leaving, self._leaving = self._leaving, {}
        for block in reversed(leaving):
            if self._ref_counts[block] == 0:
                self._rest(block)
                for order in (self._resting, self._cached, self._stuck):
                    if block in order:
                        order.move_to_end(block, last=False)

    def release_quarantine(self, blocks: Iterable[BlockId]) -> None:
        for block in blocks:
            self._quarantined.remove(block)
            self._rest(block)

    # --- checks ------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert that each frame is in one state, and each share of a cut one."""
        cached = {*self._cached, *self._resting, *self._stuck}
        held = {block for block, count in enumerate(self._ref_counts) if count} | self._quarantined | set(self._leaving)
        free = [share for shares in self._cut.values() for share in shares]
        assert len(free) == len(set(free)) and not cached & held and not (cached | held) & {*free, *self._free}
        assert len(cached) == len(self._cached) + len(self._resting) + len(self._stuck)
        assert len(self._free) == len(set(self._free)) and not self._cut.keys() & set(self._free)
        for frame in range(self.num_blocks):
            shares = self._shares(frame)
            used = [share for share in shares if share in held or share in cached]
            assert self._num_held[frame] == sum(share in held for share in shares), frame
            if frame in self._cut:
                assert used and len(used) + len(self._cut[frame]) == len(shares), f"frame {frame} lost a share"
                assert (frame in self._open) == bool(self._num_held[frame] and self._cut[frame])
                assert all((share in self._stuck) == bool(self._num_held[frame]) for share in used if share in cached)
            else:
                assert used in ([], [frame]), f"frame {frame} has {used}"
                assert (not used) == (frame in self._free), f"frame {frame} is lost or doubled"
        assert not any(share % self._step >= self.num_blocks for share in held | cached)
        assert self._num_available == self._num_held.count(0)
        spare = [len(self._shares(frame)) - self._num_held[frame] for frame in self._cut if self._num_held[frame]]
        assert self._num_spare_shares == sum(spare)
        assert set(self._resting) <= self._spare <= set(self._hash_of) and not self._spare & set(self._cached)
        assert all(self._ref_counts[block] for block in self.displaced)
        assert min(self._ref_counts) >= 0 and cached <= set(self._hash_of)
        assert {h: b for b, h in self._hash_of.items()} == self._block_of
        assert not self._quarantined & set(self._hash_of)
