"""Prefixes that a simulated worker reads from others before it computes the rest: `transfer.fetches` as times.

    begin ─> the lender's leading blocks ─> both ports carry them ─> published here ─> the prompt begins

What does not come within the fetch's patience is computed, as is what the lender has lost meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvferry.benchmarks.simulator.network import Link, Port
from kvferry.common.blocks import BlockPool
from kvferry.common.clock import Clock
from kvferry.common.messages import FetchFrom
from kvferry.common.request import Sequence as TokenSequence


class Lenders(Protocol):
    """The other workers, as a fetch meets them."""

    def lend(self, worker_id: str, hashes: Sequence[bytes]) -> tuple[int, Link, Port] | None:
        """How many of the leading blocks it has, and the way from there. None: it is gone."""
        ...

    def at(self, time_s: float, handler: Callable[..., None], *args: object) -> None: ...


class SimFetches:
    """Of one worker life."""

    def __init__(
        self,
        pool: BlockPool,
        clock: Clock,
        lenders: Lenders,
        port: Port,
        *,
        token_bytes: int,
        reserve: Callable[[], int],
    ) -> None:
        """`port`: receives. `reserve()`: blocks that must stay free or evictable."""
        self._pool = pool
        self._clock = clock
        self._lenders = lenders
        self._port = port
        self._block_bytes = token_bytes * pool.block_size
        self._reserve = reserve
        self.num_fetches = 0
        self.num_bytes = 0
        self.seconds = 0.0

    def begin(self, seq: TokenSequence, source: FetchFrom) -> bool:
        """Fetch what is missing of the prompt's beginning. False: nothing is missing, or nobody has it."""
        size = self._pool.block_size
        # The last token is always computed: its logits choose the first output token.
        count = min(source.num_tokens, seq.num_prompt_tokens - 1) // size
        hashes = seq.block_hashes[:count]
        missing = hashes[len(self._pool.match_prefix(hashes)) :]
        lent = self._lenders.lend(source.worker_id, missing) if missing else None
        if lent is None or not lent[0]:
            return False
        num_blocks, link, sending = lent
        now = self._clock.now()
        # A lender's and a reader's port are busy for as long as it takes; the patience cuts what comes too late.
        affordable = int(source.within_s * link.bytes_per_s / self._block_bytes)
        num_blocks = min(num_blocks, affordable)
        seconds = num_blocks * self._block_bytes / link.bytes_per_s
        end_s = max(sending.carry(now, seconds), self._port.carry(now, seconds)) + link.latency_s
        num_here = num_blocks if end_s - now <= source.within_s else 0
        self.num_fetches += 1
        seq.is_fetching = True
        self._lenders.at(min(end_s, now + source.within_s), self._end, seq, missing[:num_here], now)
        return True

    def _end(self, seq: TokenSequence, hashes: Sequence[bytes], began_s: float) -> None:
        """The blocks are cached here from now on; the prompt finds them there."""
        seq.is_fetching = False
        room = max(0, self._pool.num_free_blocks - self._reserve())
        kept = hashes[:room]
        blocks = self._pool.allocate(len(kept))
        for block, block_hash in zip(blocks, kept, strict=True):
            self._pool.publish(block, block_hash)
        self._pool.free(blocks)
        self.num_bytes += len(kept) * self._block_bytes
        self.seconds += self._clock.now() - began_s
