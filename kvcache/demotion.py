"""Cached blocks on their way out of the device: copied to host memory before their content is lost.

    displaced by a sequence     copied by the next step, before it computes, if the sequence has the block until then;
                                pinned until the step has ended
    next to be evicted          copied ahead, and not evicted until the step has ended

The second is for remote writers: they write into the blocks that they are granted at once, and what these were is lost
unless it was copied before. An idle engine goes further, as long as no other content gives way for it. Pure; the caller
holds the worker's lock.
"""

from __future__ import annotations

from ..common.request import BlockId
from .blocks import BlockPool
from .copy_costs import CopyCosts
from .tiers import IDLE_WINDOW, Lookahead, TierIndex

# More copies in a step keep more of what is evicted, and make the step, or the prompt behind it, wait for longer.
_IDLE_COPY_S = 0.005  # a step of copies alone takes about so long: a prompt that comes meanwhile waits for it
_IDLE_COPIES = 16  # of such a step, until the cost of a copy is known
_MIN_COPIES = 8  # of a step that computes, and beside these twice what its tokens can evict
_USUAL_TOKENS = 16  # of a block that these two are right for: of longer ones, tens of megabytes each, as many tokens
_MAX_COPIES = 1024  # of any step

Copies = list[tuple[BlockId, int]]  # from a block to a slot


class Demotion:
    """`Demotion` plans the copies from a block pool to host memory."""

    def __init__(self, pool: BlockPool, host: TierIndex, costs: CopyCosts) -> None:
        self._pool = pool
        self._host = host
        self._costs = costs
        self._lookahead = Lookahead()
        self._is_capturing = False
        self._filling: list[bytes] = []  # by the running step
        self.pinned: list[BlockId] = []  # by it, while others own them
        self.num_blocks = 0  # since start
        if host.num_slots:
            pool.on_evicted = self._on_evicted

    def allocate(self, count: int, num_thin: int) -> list[BlockId]:
        """Implement `PrefixCache.allocate`."""
        self._is_capturing = self._host.num_slots > 0
        try:
            return self._pool.allocate(count, num_thin)
        finally:
            self._is_capturing = False

    def _on_evicted(self, block: BlockId, block_hash: bytes) -> None:
        if block_hash in self._host:
            self._host.keep_longest(block_hash)
        elif self._is_capturing:
            self._pool.displaced[block] = block_hash

    # --- a step's copies -----------------------------------------------------------------------------------------

    def copies(self, num_tokens: int) -> Copies:
        """Return the copies that a step of so many tokens makes beside computing."""
        return self._copies(self._least(_MIN_COPIES) + 2 * num_tokens // self._pool.block_size if num_tokens else 0)

    def idle_copies(self) -> Copies:
        """Return the copies that a step makes that does nothing else."""
        block_s, pool, host = self._costs.block_s, self._pool, self._host
        count = self._least(_IDLE_COPIES) if not block_s else max(1, int(_IDLE_COPY_S / block_s))
        window = self._window
        if host.num_free:
            window, count = max(window, IDLE_WINDOW), min(count, host.num_free)
        self._lookahead.look(pool.coldest(), window=window, version=pool.version, is_kept=host.__contains__)
        return self._copies(count if self._pays else 0)

    def _least(self, count: int) -> int:
        """Return how many of this pool's blocks have the tokens of so many usual ones; one at least."""
        return min(count, max(1, count * _USUAL_TOKENS // self._pool.block_size))

    @property
    def _window(self) -> int:
        """Count how many of the next to be evicted shall have a copy: a quarter of the pool, less what is free."""
        pool = self._pool
        return min(pool.num_blocks, self._host.num_slots) // 4 - (pool.num_free_blocks - pool.num_cached_blocks)

    @property
    def _pays(self) -> bool:
        return self._costs.copying_pays(1, self._pool.block_size)

    def _copies(self, num_ahead: int) -> Copies:
        if not self._pays:
            num_ahead = min(num_ahead, 1)  # so that a change is noticed
        displaced = self._of_displaced()
        ahead = self._ahead(min(num_ahead, _MAX_COPIES) - len(displaced))
        self._pool.pin(block for block, _ in displaced)
        self.pinned += (block for block, _ in displaced)
        self._pool.hold(block for block, _ in ahead)
        self.num_blocks += len(displaced) + len(ahead)
        return displaced + ahead

    def _of_displaced(self) -> Copies:
        """Return the copies of what lay in blocks that sequences took, and have had ever since."""
        displaced, self._pool.displaced = self._pool.displaced, {}
        if not self._pays:
            return []
        return [
            (block, slot) for block, block_hash in displaced.items() if (slot := self._slot_for(block_hash)) is not None
        ]

    def _ahead(self, count: int) -> Copies:
        """Return the copies of what is next to be evicted and has none."""
        if count <= 0:
            return []
        pool, is_kept = self._pool, self._host.__contains__
        candidates = self._lookahead.take(
            count, order=pool.coldest(), window=self._window, version=pool.version, is_kept=is_kept
        )
        return [
            (block, slot)
            for block_hash in candidates
            if (block := pool.cached_block(block_hash)) is not None and (slot := self._slot_for(block_hash)) is not None
        ]

    def _slot_for(self, block_hash: bytes) -> int | None:
        if block_hash in self._host:
            return None
        slot = self._host.reserve(block_hash)
        if slot is not None:
            self._filling.append(block_hash)
        return slot

    def end(self) -> None:
        """Take in the end of the step: what it copied out is found from now on."""
        for block_hash in self._filling:
            self._host.fill(block_hash)
        self._pool.free(self.pinned)
        self._pool.unhold()
        self._filling, self.pinned = [], []

    @property
    def is_settled(self) -> bool:
        """Tell whether no step copies anything before blocks have changed hands."""
        if self._pool.displaced or len(self._lookahead):
            return False
        window = self._window
        return window <= 0 or not self._lookahead.would_look(window, self._pool.version)

    @property
    def is_quiet(self) -> bool:
        """Tell whether no copy is planned or under way."""
        return not (self._pool.displaced or self._filling or self.pinned)
