"""KV of sequences that is there already is found by the hashes of its blocks, or where swapping has saved it.

    awaits ─> find      of a sequence that has no blocks: leading ones in the prefix cache, in any tier, and saved ones
    publish, unpublish  of a sequence that computes: others find its full blocks, or find them no more

Tokens are hashed block by block as they become known, computed or not.
"""

from __future__ import annotations

from ..common.kv_spec import KVCacheSpec
from ..common.request import Sequence
from ..kvcache.blocks import BlockPool, hash_blocks, prefix_salt
from ..kvcache.prefix_cache import PrefixCache, PrefixHit
from ..kvcache.swap import SwapSpace


class KnownKV:
    """`KnownKV` finds and publishes; it takes no block and moves none."""

    def __init__(self, pool: BlockPool, spec: KVCacheSpec, cache: PrefixCache, swap: SwapSpace) -> None:
        self._pool = pool
        self._spec = spec
        self._cache = cache
        self._swap = swap

    def awaits(self, seq: Sequence) -> bool:
        """Is KV of a waiting sequence on its way from elsewhere? It is admitted when that is here."""
        return (
            seq.is_fetching
            or not seq.may_begin
            or (self._cache.disk is not None and self._cache.awaits(seq, self.reusable_hashes(seq)))
        )

    def reusable_hashes(self, seq: Sequence) -> list[bytes]:
        self._hash(seq)
        # The last known token is always fed: its logits choose the next one.
        num_hashed = (seq.num_tokens - 1) // self._pool.block_size
        if seq.sampling.prompt_logprobs is not None and seq.num_output_tokens == 0:
            num_hashed = 0  # they need the logits of every prompt token
        return seq.block_hashes[:num_hashed]

    def find(self, seq: Sequence) -> tuple[PrefixHit, list[int]]:
        """Return which leading blocks are in the prefix cache, and the places of those that swapping has saved."""
        hashes, saved = self.reusable_hashes(seq), self._swap.saved(seq)
        if saved is None:
            return self._cache.find(hashes), []
        found, loads = PrefixHit(dict(enumerate(self._pool.match_prefix(hashes)))), []
        place, is_whole = len(found), True
        while is_whole:
            block = self._pool.match_prefix(hashes[place : place + 1])
            if block:
                found.hits[place] = block[0]
            elif place in saved.slots:
                loads.append(place)
                is_whole = (place + 1) * self._pool.block_size <= saved.num_tokens
            elif place < len(hashes) and self._cache.has_in_host(hashes[place]):
                found.promoted[place] = hashes[place]
            else:
                break
            place += 1
        return found, loads

    def _hash(self, seq: Sequence) -> None:
        """Hash all known full blocks, those that are not computed yet among them."""
        if len(seq.block_hashes) < seq.num_tokens // self._pool.block_size:
            salt = prefix_salt(self._spec, seq.cache_salt, seq.adapter)
            seq.block_hashes = hash_blocks(seq.token_ids, self._pool.block_size, salt, seq.block_hashes)

    def publish(self, seq: Sequence) -> None:
        """Full blocks whose KV exists can be found from now on."""
        num_full = seq.num_computed_tokens // self._pool.block_size
        if num_full <= seq.num_published_blocks:
            return
        self._hash(seq)
        for index in range(seq.num_published_blocks, num_full):
            self._pool.publish(seq.block_table[index], seq.block_hashes[index], spare=seq.is_retained_elsewhere)
        seq.num_published_blocks = num_full

    def unpublish(self, seq: Sequence) -> None:
        """Nobody finds its KV any more."""
        for block in seq.block_table:
            self._pool.forget(block)
