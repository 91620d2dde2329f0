"""KV of sequences that is there already is found by the hashes of its blocks, or where swapping has saved it.

    awaits ─> find      of a sequence that has no blocks: leading ones in the prefix cache, in any tier, and saved ones
    publish, unpublish  of a sequence that computes: others find its full blocks, or find them no more

Tokens are hashed block by block as they become known, computed or not.
"""

from __future__ import annotations

from ..common.kv_spec import KVCacheSpec
from ..common.request import Sequence, reuses_prefix
from ..kvcache.blocks import BlockPool, hash_blocks, prefix_salt
from ..kvcache.prefix_cache import PrefixCache, PrefixHit
from ..kvcache.swap import SwapSpace
from ..kvcache.thin import ThinRule, forms, name_of, num_usable


class KnownKV:
    """`KnownKV` finds and publishes; it takes no block and moves none."""

    def __init__(self, pool: BlockPool, spec: KVCacheSpec, cache: PrefixCache, swap: SwapSpace) -> None:
        self._pool = pool
        self._spec = spec
        self._cache = cache
        self._swap = swap

    def awaits(self, seq: Sequence) -> bool:
        """Is KV of a waiting sequence on its way from elsewhere? It is admitted when that is here."""
        if seq.is_fetching or not seq.may_begin:
            return True
        return self._cache.awaits(seq, lambda: self.reusable_hashes(seq))

    def reusable_hashes(self, seq: Sequence) -> list[bytes]:
        self._hash(seq)
        if not self._reuses(seq):
            return []
        # The last known token is always fed: its logits choose the next one.
        return seq.block_hashes[: (seq.num_tokens - 1) // self._pool.block_size]

    @staticmethod
    def _reuses(seq: Sequence) -> bool:
        return seq.num_output_tokens > 0 or reuses_prefix(seq.sampling, None)

    def looks_up(self, seq: Sequence) -> bool:
        """Tell whether blocks are looked for in the prefix cache when the sequence is begun."""
        return self._pool.enable_prefix_caching and self._reuses(seq)

    def find(self, seq: Sequence) -> tuple[PrefixHit, list[int]]:
        """Return which leading blocks are in the prefix cache, and the places of those that swapping has saved."""
        hashes, saved = self.reusable_hashes(seq), self._swap.saved(seq)
        if saved is None:
            return self._cache.find(hashes), []
        names, thin = list[bytes | None](), list[int]()  # of leading blocks, None: saved; places of the thin ones
        num_thin, is_whole = self._spec.num_thin_blocks(saved.num_tokens), True
        while is_whole:
            place = len(names)
            ways = forms(hashes, place, num_thin)
            name = next(filter(self._pool.knows, ways), None)
            if name is None and place in saved.slots:
                is_whole = (place + 1) * self._pool.block_size <= saved.num_tokens
            elif name is None and (name := next(filter(self._cache.has_in_host, ways), None)) is None:
                break
            if place < seq.num_thin_blocks if name is None else name != hashes[place]:
                thin.append(place)
            names.append(name)
        return self._placed(names[: num_usable(len(names), thin, self._thin_rule(saved.num_tokens))], thin)

    def _thin_rule(self, num_tokens: int) -> ThinRule:
        """Return the rule where the last of what was saved, of so many tokens, may be a part of a block."""
        size, num_thin = self._pool.block_size, self._spec.num_thin_blocks
        return lambda num_blocks: num_thin(min(num_blocks * size, num_tokens))

    def _placed(self, names: list[bytes | None], thin: list[int]) -> tuple[PrefixHit, list[int]]:
        """Say where blocks of these names lie, and which places have none: they were saved."""
        found = PrefixHit(num_thin=max((place + 1 for place in thin if place < len(names)), default=0))
        for place, name in enumerate(names):
            if name is None:
                continue
            if (block := self._pool.block_of(name)) is not None:
                found.hits[place] = block
            else:
                found.promoted[place] = name
        return found, [place for place, name in enumerate(names) if name is None]

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
            self._pool.publish(seq.block_table[index], name_of(seq, index), spare=seq.is_retained_elsewhere)
        seq.num_published_blocks = num_full

    def unpublish(self, seq: Sequence) -> None:
        """Nobody finds its KV any more."""
        for block in seq.block_table:
            self._pool.forget(block)
