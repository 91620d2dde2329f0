"""Checksums over tags: what `transfer.protocol.checksums.PageSums` is over bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .engine import Memory

_MASK = (1 << 64) - 1


class MemorySums:
    """Sums over one simulated worker's pages, with the methods of `PageSums`."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def add(
        self,
        sums: npt.NDArray[np.uint64],
        slots: npt.NDArray[np.int32],
        ours: npt.NDArray[np.int32],
        theirs: npt.NDArray[np.int32],
        runs: tuple[tuple[int, int], ...],
    ) -> None:
        """Fold pages into the sums of their blocks; each is seeded with its index over there."""
        pages = self._memory.pages
        found = [
            hash((tuple(pages[page]), seed)) & _MASK for page, seed in zip(ours.tolist(), theirs.tolist(), strict=True)
        ]
        np.bitwise_xor.at(sums, slots, np.array(found, dtype=np.uint64))
