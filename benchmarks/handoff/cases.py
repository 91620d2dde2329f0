"""What is handed over in a measurement: model shapes, prompt sizes, and how the blocks lie in both pools.

contiguous   ascending block ids on both sides, as fresh pools give them
aged         as pools give them that have served and evicted many prompts of all lengths
scattered    no order on either side: the worst that can be
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.kvcache.blocks import BlockPool
from kvferry.transfer.backends.base import Piece
from kvferry.transfer.backends.host_memory import PageArea, Runs, paired_runs
from kvferry.transfer.send.sender import MAX_WRITE_BYTES

Table = Literal["contiguous", "aged", "scattered"]
TABLES: tuple[Table, ...] = ("contiguous", "aged", "scattered")
BLOCK_SIZE = 16  # tokens
_AGING_PROMPT_BLOCKS = (2, 128)
_AGING_LIVE_SHARE = 0.4  # of the pool, held by running sequences
_AGING_ROUNDS = 6  # times that every block is given out


def cache_spec(name: str, num_layers: int, num_kv_heads: int, head_dim: int) -> KVCacheSpec:
    return KVCacheSpec(
        model=name,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=BLOCK_SIZE,
        dtype="bfloat16",
    )


SPECS = {
    "smollm2-135m": cache_spec("smollm2-135m", 30, 3, 64),  # pages of 12 KiB
    "llama-3-8b": cache_spec("llama-3-8b", 32, 8, 128),  # pages of 64 KiB
}


class Handover(NamedTuple):
    """Pages in the order of shipping, layer by layer."""

    local: npt.NDArray[np.int32]
    remote: npt.NDArray[np.int32]

    @classmethod
    def of(
        cls, spec: KVCacheSpec, local_blocks: Sequence[int], remote_blocks: Sequence[int], num_blocks: int
    ) -> Handover:
        """Of a whole prompt; both pools have `num_blocks`. Blocks go in the order of ours, as they are shipped."""
        local = np.asarray(local_blocks, dtype=np.int32)
        order = np.argsort(local)
        remote = np.asarray(remote_blocks, dtype=np.int32)
        first_pages = np.arange(spec.num_layers, dtype=np.int32)[:, None] * np.int32(num_blocks)
        return cls((first_pages + local[order]).ravel(), (first_pages + remote[order]).ravel())

    def runs(self, here: PageArea, there: PageArea) -> list[tuple[Runs, Runs]]:
        """The pieces of each write, cut and merged as sender and backend do it."""
        piece = (Piece(0, 0, here.page_bytes),)
        pages = max(1, MAX_WRITE_BYTES // here.page_bytes)
        return [
            paired_runs(here, self.local[start : start + pages], there, self.remote[start : start + pages], piece)
            for start in range(0, len(self.local), pages)
        ]


def arrange(pool: BlockPool, table: Table, rng: random.Random) -> None:
    """Make the pool, of which nothing is in use, give out its blocks in this order."""
    if table == "aged":
        _age(pool, rng)
        return
    blocks = pool.allocate(pool.num_blocks)  # evicts what was cached: all of it is free and without content
    blocks.sort()
    if table == "scattered":
        rng.shuffle(blocks)
    pool.free(blocks)


def _age(pool: BlockPool, rng: random.Random) -> None:
    """Serve prompts that come and go until every block was given out several times; then end them all."""
    running: list[list[int]] = []
    num_given = 0
    while num_given < _AGING_ROUNDS * pool.num_blocks:
        wanted = min(rng.randint(*_AGING_PROMPT_BLOCKS), pool.num_blocks // 4)
        while running and pool.num_owned_blocks + wanted > _AGING_LIVE_SHARE * pool.num_blocks:
            pool.free(running.pop(rng.randrange(len(running))))
        blocks = pool.allocate(wanted)
        for block in blocks:
            pool.publish(block, rng.randbytes(16))
        running.append(blocks)
        num_given += wanted
    for blocks in running:
        pool.free(blocks)
