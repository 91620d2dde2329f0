"""Prefixes that a simulated worker reads from others before it computes the rest: `transfer.fetches` as times.

    begin ─> the lender's leading blocks ─> both ports carry them ─> published here ─> the prompt begins
             (from its host memory: a step of the lender's later)

What does not come within the fetch's patience is computed, as is what the lender has lost meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..common.clock import Clock
from ..common.messages import FetchFrom
from ..common.request import Sequence as TokenSequence
from ..kvcache.blocks import BlockPool
from .costs.network import Link, Port


class Lenders(Protocol):
    """The other workers, as a fetch meets them."""

    def lend(self, worker_id: str, hashes: Sequence[bytes], answer: Callable[[int, Link, Port], None]) -> bool:
        """`answer` hears how many of the leading blocks it has, and the way from there; at once, or when they have been
        brought to its device. False: it is gone, or has none.
        """
        ...

    def at(self, time_s: float, handler: Callable[..., None], *args: object) -> None: ...


class SimFetches:
    """The prefix fetches of one worker's life."""

    def __init__(
        self,
        pool: BlockPool,
        clock: Clock,
        lenders: Lenders,
        port: Port,
        *,
        token_bytes: int,
        reserve: Callable[[], int],
        also_held: Callable[[bytes], bool] = lambda block_hash: False,
    ) -> None:
        """`port`: receives. `reserve()`: blocks that must stay free or evictable. `also_held`: in a lower tier here."""
        self._pool = pool
        self._clock = clock
        self._lenders = lenders
        self._port = port
        self._block_bytes = token_bytes * pool.block_size
        self._reserve = reserve
        self._also_held = also_held
        self.num_fetches = 0
        self.num_bytes = 0
        self.seconds = 0.0

    def begin(self, seq: TokenSequence, source: FetchFrom) -> bool:
        """Fetch what is missing of the prompt's beginning. False: nothing is missing, or nobody has it."""
        size = self._pool.block_size
        # The last token is always computed: its logits choose the first output token.
        count = min(source.num_tokens, seq.num_prompt_tokens - 1) // size
        hashes = seq.block_hashes[:count]
        missing = hashes[self._num_held(hashes) :]
        if not missing:
            return False
        began_s = self._clock.now()
        seq.is_fetching = True  # before the answer, which may come at once

        def read(num_blocks: int, link: Link, sending: Port) -> None:
            self._read(seq, missing[:num_blocks], link, sending, began_s, source.within_s)

        if not self._lenders.lend(source.worker_id, missing, read):
            seq.is_fetching = False
            return False
        self.num_fetches += 1
        return True

    def _num_held(self, hashes: Sequence[bytes]) -> int:
        """Leading blocks that are here in some tier."""
        held = 0
        while held < len(hashes) and (self._pool.match_prefix([hashes[held]]) or self._also_held(hashes[held])):
            held += 1
        return held

    def _read(
        self, seq: TokenSequence, hashes: Sequence[bytes], link: Link, sending: Port, began_s: float, within_s: float
    ) -> None:
        now = self._clock.now()
        # A lender's and a reader's port are busy for as long as it takes; the patience cuts what comes too late.
        left_s = max(0.0, began_s + within_s - now)
        hashes = hashes[: int(left_s * link.bytes_per_s / self._block_bytes)]
        if not hashes:
            self._lenders.at(now, self._end, seq, hashes, began_s)
            return
        seconds = len(hashes) * self._block_bytes / link.bytes_per_s
        end_s = max(sending.carry(now, seconds), self._port.carry(now, seconds)) + link.latency_s
        if end_s - began_s > within_s:
            hashes = hashes[:0]
        self._lenders.at(min(end_s, began_s + within_s), self._end, seq, hashes, began_s)

    def _end(self, seq: TokenSequence, hashes: Sequence[bytes], began_s: float) -> None:
        """The blocks are cached here from now on; the prompt finds them there."""
        seq.is_fetching = False
        room = max(0, self._pool.num_free_blocks - self._reserve())
        kept = hashes[:room]
        blocks = self._pool.allocate(len(kept))
        for block, block_hash in zip(blocks, kept, strict=True):
            self._pool.publish(block, block_hash, spare=seq.is_retained_elsewhere)
        self._pool.free(blocks)
        self.num_bytes += len(kept) * self._block_bytes
        self.seconds += self._clock.now() - began_s
