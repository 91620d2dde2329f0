"""A decode worker makes thin what it computed itself where memory gets short, so that it takes a part of it.

    a running sequence's blocks   | whole  whole  whole  whole | whole  whole | next token
                                    behind what windows reach
    the first becomes a share of its frame, where it lies; the others are copied into shares beside it, and their frames
    are free when the next step has ended

It takes no step and loses no token. But who begins with the same tokens and parts from them further back finds what is
whole no more, so it waits until little is free.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from ..common.kv_spec import KVCacheSpec
from ..common.request import Sequence
from ..kvcache.blocks import BlockPool
from ..kvcache.frame_pool import FramePool
from .sequence_blocks import SequenceBlocks

# Of the pool's blocks: so many are kept free. Less, and sequences that grow are preempted before copies have made room;
# more, and prompts that share a beginning are computed anew that might have found it.
_FREE_SHARE = 0.25
# In a step: they go before what it computes. Of Gemma 3 27B a block's are 2.6 MB, read and written: 0.1 ms on an H200.
_MAX_COPIES = 64


class Thinning:
    """Makes room between two steps."""

    def __init__(self, pool: BlockPool, spec: KVCacheSpec, blocks: SequenceBlocks) -> None:
        self._pool = pool if isinstance(pool, FramePool) else None
        self._spec = spec
        self._blocks = blocks
        self.num_blocks = 0  # since start

    def make_room(self, *sequences: Iterable[Sequence]) -> None:
        """Make blocks of these thin as far as little is free, the first ones' first."""
        pool = self._pool
        if pool is None:
            return
        wanted = min(_MAX_COPIES, int(_FREE_SHARE * pool.num_blocks) - self._blocks.num_available)
        for seq in chain(*sequences):
            if wanted <= 0:
                return
            if not self._blocks.is_loading(seq):
                wanted -= self._thin_out(pool, seq, wanted)

    def _thin_out(self, pool: FramePool, seq: Sequence, most: int) -> int:
        """Make a sequence's own blocks thin. Returns how many are copied: as many frames will be free."""
        num_copied, first, end = 0, seq.num_thin_blocks, self._spec.num_left_out(seq.num_computed_tokens)
        if end <= first:
            return 0
        table, place = list(seq.block_table), first  # another list: who has forecast the next step knows it by that
        while place < end and num_copied < most:
            block = table[place]
            if pool.ref_count(block) == 1 and not pool.is_thin(block):
                pool.forget(block)
                if pool.has_free_share:
                    [table[place]] = pool.allocate(1, 1)
                    self._blocks.move(block, table[place])
                    num_copied += 1
                else:
                    pool.cut(block)
            place += 1
        seq.block_table, seq.num_thin_blocks = table, place
        seq.num_published_blocks = min(seq.num_published_blocks, first)  # anew, when the copies are made
        self.num_blocks += place - first
        return num_copied
