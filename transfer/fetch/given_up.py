"""Blocks of reads that nobody waits for any more, kept out of use while something may still land in them.

    add ─> rank_over of each rank that may still write ─> the pool has them back

A reader tells for each rank when its read is over (`reader.py`): it has ended, or the agent that read is gone.
"""

from __future__ import annotations

from ...common.request import BlockId
from ...kvcache.blocks import BlockPool
from .fetch import Part


class GivenUp:
    """Owner of the blocks of parts that were given up."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._parts: dict[int, Part] = {}  # by fetch id

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, fetch_id: int) -> bool:
        return fetch_id in self._parts

    @property
    def num_blocks(self) -> int:
        """Return how many blocks are kept out of use, as a read may still land in them."""
        return sum(len(part.blocks) for part in self._parts.values())

    def add(self, part: Part) -> None:
        """Take over a part that some rank may still write into."""
        self._parts[part.fetch_id] = part

    def rank_over(self, fetch_id: int, rank: int) -> None:
        """Nothing of this rank's lands any more. After the last one the blocks are free."""
        part = self._parts[fetch_id]
        part.waits_for.discard(rank)
        if not part.waits_for:
            del self._parts[fetch_id]
            self._pool.free(part.blocks)

    def references(self) -> list[list[BlockId]]:
        return [part.blocks for part in self._parts.values()]

    def check(self) -> None:
        """Assert that each is waited for."""
        assert all(part.waits_for for part in self._parts.values())
