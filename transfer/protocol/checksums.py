"""Checksums of shipped blocks: what a prefill rank wrote must be what the decode rank finds, before it is used.

    sender     page by page after its post, on the transfer thread ─> 8 bytes for each block ─> KVArrived
    receiver   the same pages read back, on the transfer thread and outside of the worker's lock ─> Verdict

A page's sum is XXH3 of the bytes that were shipped of it, seeded with its index over there; a block's is the XOR of its
pages' sums over the layers. So layers may come in any order, and a page in another's place does not fit. They find
bytes that are missing or wrong when they are adopted. They cannot find a write that lands later: that is the fence's
business. The library keeps to one core: some 10 to 30 GB/s, which is less than the copy of the same page costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from ...common import failpoints
from ...common.config import TransferConfig
from ...common.errors import ConfigError
from ...common.kv_spec import KVCacheSpec
from ...wire.handoff import KVArrived
from ..backends.base import Piece, page_rows
from .handoff import Verdict, are_ids, num_thin_behind, pages_of
from .shards import pieces

if TYPE_CHECKING:
    import torch

_Sums = npt.NDArray[np.uint64]  # one for each shipped block
_Pages = npt.NDArray[np.int32]
_RUN_SEED = 1 << 32  # of the second run of a page, where heads are shipped: added to its seed


class PageSums:
    """Sums over one rank's pages, which are host memory."""

    def __init__(self, pages: torch.Tensor) -> None:
        rows = page_rows(pages).numpy()
        self._page_bytes = rows.shape[1]
        self._num_pages = rows.shape[0]
        self.view = memoryview(rows.data).cast("B")

    def add(self, sums: _Sums, slots: _Pages, ours: _Pages, theirs: _Pages, runs: tuple[tuple[int, int], ...]) -> None:
        """Fold pages into the sums of their blocks. `runs`: (offset, bytes) in each of our pages."""
        assert not len(ours) or (ours.min() >= 0 and ours.max() < self._num_pages), "a page outside of the pool"
        view, digest = self.view, xxhash.xxh3_64_intdigest
        for number, (offset, num_bytes) in enumerate(runs):
            starts = ours.astype(np.int64) * self._page_bytes + offset
            seeds = theirs.astype(np.int64) + number * _RUN_SEED
            found = [
                digest(view[start : start + num_bytes], seed)
                for start, seed in zip(starts.tolist(), seeds.tolist(), strict=True)
            ]
            np.bitwise_xor.at(sums, slots, np.array(found, dtype=np.uint64))


def open_sums(config: TransferConfig, pages: torch.Tensor) -> PageSums | None:
    """Open the sums that the setting asks for over these pages; None: no checksums. Raises ConfigError."""
    if config.kv_checksum == "off" or (config.kv_checksum == "auto" and pages.is_cuda):
        return None
    if pages.is_cuda:
        raise ConfigError("kv_checksum: on needs KV pages in host memory, and these are a GPU's; use auto or off")
    return PageSums(pages)


class ShipmentSums:
    """`ShipmentSums` sums what one source rank ships to one decode rank."""

    def __init__(self, spec: KVCacheSpec, block_ids: tuple[int, ...], num_blocks: int, num_thin: int = 0) -> None:
        """`num_blocks`: of the decode worker's allocation; `num_thin`: of the ids, the first ones."""
        pages, slots = pages_of(spec, block_ids, num_blocks, num_thin)
        self._slot_of = np.zeros(spec.num_layers * num_blocks, dtype=np.int32)
        self._slot_of[pages] = slots
        self._sums: _Sums = np.zeros(len(block_ids), dtype=np.uint64)

    def add(self, pages: PageSums, ours: _Pages, theirs: _Pages, shipped: tuple[Piece, ...]) -> None:
        runs = tuple((piece.local_offset, piece.num_bytes) for piece in shipped)
        pages.add(self._sums, self._slot_of[theirs], ours, theirs, runs)

    def to_bytes(self) -> bytes:
        return self._sums.astype("<u8").tobytes()


class ArrivalCheck:
    """One decode rank's look at what has arrived. Without state: whose blocks they are is the receiver's concern."""

    def __init__(self, sums: PageSums, spec: KVCacheSpec, *, rank: int, tp_size: int, num_blocks: int) -> None:
        self._sums = sums
        self._spec = spec
        self._tp_size = tp_size
        self._shard = spec.shard(rank, tp_size)
        self._num_blocks = num_blocks

    def verdict(self, message: KVArrived) -> Verdict:
        """Compare, on the transfer thread, before the arrival is told."""
        if not message.checksum:
            return Verdict.UNCHECKED
        blocks = message.block_ids
        if not self._is_possible(message):
            return Verdict.CORRUPT
        shipped = pieces(self._spec.shard(message.source_rank, message.tp_size), self._shard, self._spec)
        if shipped is None:
            return Verdict.CORRUPT
        runs = tuple((piece.remote_offset, piece.num_bytes) for piece in shipped)
        if failpoints.armed and failpoints.hit("kv.corrupt"):
            self._spoil(blocks[-1], runs[0][0])
        found: _Sums = np.zeros(len(blocks), dtype=np.uint64)
        pages, slots = pages_of(self._spec, blocks, self._num_blocks, self._num_thin(message))
        self._sums.add(found, slots, pages, pages, runs)
        return Verdict.INTACT if found.astype("<u8").tobytes() == message.checksum else Verdict.CORRUPT

    def _num_thin(self, message: KVArrived) -> int:
        """Count the blocks that come thin: the first ones."""
        count = len(message.block_ids)
        first = self._spec.num_blocks_for(message.num_tokens) - count
        return num_thin_behind(self._spec, message.num_tokens, first, count)

    def _is_possible(self, message: KVArrived) -> bool:
        """A message that a correct peer may have sent: nothing outside of the pool is read."""
        blocks = message.block_ids
        return (
            0 < len(blocks) <= self._spec.num_blocks_for(message.num_tokens)
            and are_ids(self._spec, blocks, self._num_blocks, self._num_thin(message))
            and self._spec.fits_ranks(message.tp_size)
            and message.source_rank < message.tp_size
        )

    def _spoil(self, block: int, offset: int) -> None:
        """Change one bit of what has arrived, as a drill asked."""
        self._sums.view[block * self._spec.page_bytes(self._tp_size) + offset] ^= 1


def open_check(
    config: TransferConfig, pages: torch.Tensor, spec: KVCacheSpec, *, rank: int, tp_size: int
) -> ArrivalCheck | None:
    """One decode rank's; None: nothing is checked. Raises ConfigError."""
    sums = open_sums(config, pages)
    if sums is None:
        return None
    return ArrivalCheck(sums, spec, rank=rank, tp_size=tp_size, num_blocks=pages.shape[1])
