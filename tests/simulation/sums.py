"""Checksums over tags: what `transfer.protocol.checksums.PageSums` is over bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .memory import Memory

_MASK = (1 << 64) - 1


class MemorySums:
    """Sums over the pages of one rank of a simulated worker, with the methods of `PageSums`."""

    def __init__(self, memory: Memory, page_bytes: int) -> None:
        self._memory = memory
        self._tag_bytes = page_bytes // memory.page_len

    def add(
        self,
        sums: npt.NDArray[np.uint64],
        slots: npt.NDArray[np.int32],
        ours: npt.NDArray[np.int32],
        theirs: npt.NDArray[np.int32],
        runs: tuple[tuple[int, int], ...],
    ) -> None:
        """Fold pages into the sums of their blocks; each run is seeded with its index over there, and its number."""
        pages = self._memory.pages
        for number, (offset, num_bytes) in enumerate(runs):
            first, end = offset // self._tag_bytes, (offset + num_bytes) // self._tag_bytes
            found = [
                hash((tuple(pages[page][first:end]), seed, number)) & _MASK
                for page, seed in zip(ours.tolist(), theirs.tolist(), strict=True)
            ]
            np.bitwise_xor.at(sums, slots, np.array(found, dtype=np.uint64))
