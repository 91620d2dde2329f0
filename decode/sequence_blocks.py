"""The blocks of a decode worker's sequences: taken, shared, copied, swapped out and given back.

    restore ──> grow, publish ... ──> give_back            the sequence ends
       ^                               │
       └── host slots, prefix cache ── evict               it is preempted

Who touches a block's bytes and when: prefill workers write into blocks that the pool has handed out for a grant, at
any time; the engine copies and computes between `begin` and `end` of a step. So whatever a step reads or writes stays
out of the pool until its end. Blocks that are being swapped out may still be filled anew by the same step, which
copies out first: they are `_outgoing`.
"""

from __future__ import annotations

from collections.abc import Container

from ..common.batch import Batch, BatchRow
from ..common.kv_spec import KVCacheSpec
from ..common.request import BlockId, Sequence
from ..kvcache.blocks import BlockPool
from ..kvcache.prefix_cache import PrefixCache, PrefixHit
from ..kvcache.swap import SwapSpace
from .known_kv import KnownKV


class SequenceBlocks:
    """`SequenceBlocks` stands between the scheduler and the pool, and decides nothing about who gets blocks."""

    def __init__(
        self, pool: BlockPool, spec: KVCacheSpec, num_swap_blocks: int, cache: PrefixCache | None = None
    ) -> None:
        """`cache`: around the pool; None: one without further tiers."""
        self._pool = pool
        self.cache = cache if cache is not None else PrefixCache(pool)
        self.swap = SwapSpace(num_swap_blocks, self.cache.costs)
        self.known = KnownKV(pool, spec, self.cache, self.swap)
        # Block copies (from, to) that the next step begins with; each holds a reference to its source.
        self._copies: list[tuple[BlockId, BlockId]] = []
        self._outgoing: list[BlockId] = []  # of evicted sequences; the next step copies them out
        self._reused: set[BlockId] = set()  # blocks of `_outgoing` that have a new owner already
        self._held: list[BlockId] = []  # references that are given back when the step has ended
        self._copying: list[BlockId] = []  # sources of the copies that the running step began with
        self.prefix_queries = 0  # tokens of prompts that were begun here
        self.prefix_hits = 0

    def num_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._pool.block_size)

    @property
    def num_available(self) -> int:
        return self._pool.num_free_blocks + len(self._reusable())

    def _reusable(self) -> list[BlockId]:
        """Outgoing blocks that were not found in the prefix cache meanwhile, and have memory of their own."""
        pool = self._pool
        return [block for block in self._outgoing if pool.ref_count(block) == 1 and not pool.is_thin(block)]

    def _take(self, count: int, num_thin: int = 0) -> list[BlockId]:
        """Take blocks, the first `num_thin` for thin ones."""
        num_fresh = count - max(0, self._pool.num_needed(count, num_thin) - self._pool.num_free_blocks)
        blocks = self.cache.allocate(num_fresh, num_thin)
        reused = self._reusable()[num_fresh - count :] if num_fresh < count else []
        for block in reused:
            self._outgoing.remove(block)
            self._pool.forget(block)
        self._reused.update(reused)
        return blocks + reused

    def _release(self, blocks: list[BlockId]) -> None:
        """Give references back: at once, or after the step that copies the block out."""
        self._held += [block for block in blocks if block in self._reused]
        self._pool.free([block for block in blocks if block not in self._reused])

    # --- a sequence's blocks ------------------------------------------------------------------------------------

    def has_slot(self, seq: Sequence) -> bool:
        """Room for its next token, and those fed again with it, in its blocks."""
        return seq.num_computed_tokens + seq.num_fed_again < len(seq.block_table) * self._pool.block_size

    def grow(self, seq: Sequence) -> None:
        """One block more. The table stays the same list: forecasts know it by that."""
        seq.block_table += self._take(1)

    def cover(self, seq: Sequence) -> bool:
        """Blocks for all of its known tokens. False: there is no room."""
        missing = self.num_for(seq.num_tokens) - len(seq.block_table)
        if missing > self.num_available:
            return False
        seq.block_table += self._take(max(0, missing))
        return True

    def share(self, parent: Sequence, child: Sequence) -> bool:
        """`child` continues from the parent's KV: full blocks are shared, a partial last one is copied.

        False: no room for the copy.
        """
        num_full, partial = divmod(parent.num_computed_tokens, self._pool.block_size)
        child.has_begun = True
        if partial and self._pool.num_free_blocks == 0:
            return False
        shared = parent.block_table[:num_full]
        self._pool.pin(shared)
        child.block_table = list(shared)
        if partial:
            child.block_table += self._pool.allocate(1)
            self.copy(parent.block_table[num_full], child.block_table[-1])
        child.num_computed_tokens = parent.num_computed_tokens
        child.num_cached_tokens = parent.num_cached_tokens
        child.block_hashes = list(parent.block_hashes)
        child.num_published_blocks, child.num_thin_blocks = num_full, parent.num_thin_blocks
        return True

    def deal(self, sequences: list[Sequence], num_tokens: int, blocks: list[BlockId], copies: list[BlockId]) -> None:
        """Hand a prompt's blocks to its sequences: full ones shared, each its own copy of a partial last one.

        `copies`: blocks for these, one for each sequence but the first; what is not needed goes back.
        """
        num_full, partial = divmod(num_tokens, self._pool.block_size)
        for index, seq in enumerate(sequences):
            if index > 0:
                self._pool.pin(blocks[:num_full])
            seq.block_table = list(blocks[:num_full])
            if partial:
                last = blocks[num_full] if index == 0 else copies.pop()
                if index > 0:
                    self.copy(blocks[num_full], last)
                seq.block_table.append(last)
            seq.num_computed_tokens = num_tokens
            seq.num_published_blocks = num_full
        self._pool.free(copies)
        if not sequences:
            self._pool.free(blocks)

    def copy(self, source: BlockId, target: BlockId) -> None:
        """Copy a block's content when the next step begins."""
        self._pool.pin([source])
        self.move(source, target)

    def move(self, source: BlockId, target: BlockId) -> None:
        """Copy a block's content when the next step begins, with the one reference that there is to it."""
        self._copies.append((source, target))

    def is_loading(self, seq: Sequence) -> bool:
        """Tell whether copies into its blocks are waiting for the next step."""
        return self.swap.is_loading(seq) or self.cache.is_promoting(seq.block_table)

    def give_back(self, seq: Sequence) -> None:
        """Free the sequence's blocks; a copy into one of them must not run: it may have a new owner by then."""
        self._pool.free([source for source, _ in self._cancel_copies(seq)])
        self.cache.cancel(seq.block_table)
        self._release(seq.block_table)
        seq.block_table = []

    def _cancel_copies(self, seq: Sequence) -> list[tuple[BlockId, BlockId]]:
        table = set(seq.block_table)
        cancelled = [copy for copy in self._copies if copy[1] in table]
        if cancelled:
            self._copies = [copy for copy in self._copies if copy[1] not in table]
        return cancelled

    # --- preempted and admitted again ---------------------------------------------------------------------------

    def num_freed_by(self, seq: Sequence, wanted: Container[BlockId] = ()) -> int:
        """Count the blocks that nobody else holds, without those that are `wanted` for what they contain."""
        return self._pool.num_freed_by([block for block in seq.block_table if block not in wanted])

    def evict(self, seq: Sequence) -> None:
        """Take a sequence's blocks away. Its KV goes to host memory if that is cheaper than computing it again."""
        if self.swap.take_back(seq) or self.cache.is_promoting(seq.block_table):
            self.give_back(seq)
        else:
            places = self._places_to_save(seq)
            if self.swap.wants(len(places), min(seq.num_computed_tokens, len(places) * self._pool.block_size)):
                self._swap_out(seq, places)
            else:
                self.give_back(seq)
        seq.num_computed_tokens = seq.num_published_blocks = seq.num_fed_again = 0

    def count(self, seq: Sequence, num_tokens: int) -> None:
        """Count so many tokens more as computed; full blocks are then for all to find."""
        seq.num_computed_tokens += num_tokens
        seq.num_fed_again = 0
        assert seq.num_computed_tokens <= len(seq.block_table) * self._pool.block_size, "a run beyond its blocks"
        self.known.publish(seq)

    def _places_to_save(self, seq: Sequence) -> list[int]:
        """Computed blocks, less those that others hold as well and that are found by their hash."""
        pool, table = self._pool, seq.block_table
        computed = range(self.num_for(seq.num_computed_tokens))
        return [n for n in computed if pool.ref_count(table[n]) == 1 or not pool.is_published(table[n])]

    def _swap_out(self, seq: Sequence, places: list[int]) -> None:
        table = seq.block_table
        sources = {target: source for source, target in self._cancel_copies(seq)}  # not copied yet: read it there
        self._held += sources.values()
        self.swap.save(seq, places, [sources.get(table[place], table[place]) for place in places])
        saved = {table[place] for place in places}
        self._outgoing += [block for block in table if block in saved and self._pool.ref_count(block) == 1]
        self._held += [block for block in table if block in saved and self._pool.ref_count(block) > 1]
        self._release([block for block in table if block not in saved])
        seq.block_table = []

    def shortage(self, seq: Sequence) -> tuple[int, frozenset[BlockId]]:
        """Return how many blocks are missing for a sequence's known tokens beside those that it finds, and these."""
        found, slots = self.known.find(seq)
        missing = self._num_missing(seq, found.hits, len(self._thin_places(seq, found, slots)), 0)
        return missing, frozenset(found.hits.values())

    def _num_missing(self, seq: Sequence, hits: dict[int, BlockId], num_thin: int, reserve: int) -> int:
        """Count what is missing, if `num_thin` of what is not among the hits are thin."""
        found, count = set(hits.values()), self.num_for(seq.num_tokens) - len(hits)
        free = self._pool.num_free_blocks - self._pool.num_evictable(found)
        needed = self._pool.num_needed(count, num_thin, found)
        num_reusable = len(set(self._reusable()) - found)  # by whole blocks alone
        return max(needed + reserve - free - num_reusable, needed - (count - num_thin) - free)

    def _thin_places(self, seq: Sequence, found: PrefixHit, slots: list[int]) -> set[int]:
        """Return the places of what is copied in and may share memory with other thin blocks."""
        if self._pool.num_shares == 1:
            return set()
        promoted = {place for place, name in found.promoted.items() if name != seq.block_hashes[place]}
        return promoted.union(place for place in slots if place < seq.num_thin_blocks)

    def restore(self, seq: Sequence, reserve: int) -> bool:
        """Give a waiting sequence blocks for its known tokens, if `reserve` stay available, and the KV that there is:
        what the prefix cache has in any tier, then what swapping has saved, up to the first block that neither has.
        """
        found, slots = self.known.find(seq)
        hits, thin = found.hits, self._thin_places(seq, found, slots)
        if self._num_missing(seq, hits, len(thin), reserve) > 0:
            return False
        self._pool.pin(hits.values())
        if not seq.is_retained_elsewhere:
            self._pool.keep(hits.values())
        fresh = self._take(self.num_for(seq.num_tokens) - len(hits), len(thin))
        for_thin, whole = iter(fresh[: len(thin)]), iter(fresh[len(thin) :])
        places = range(self.num_for(seq.num_tokens))
        seq.block_table = [hits[n] if n in hits else next(for_thin if n in thin else whole) for n in places]
        self._count_computed(seq, found, slots)
        self.cache.promote(found, seq.block_table)
        self.cache.forget(seq)
        if slots:
            self.swap.load(seq, {place: seq.block_table[place] for place in slots})
        else:
            self.swap.drop(seq)
        return True

    def _count_computed(self, seq: Sequence, found: PrefixHit, slots: list[int]) -> None:
        num_found, num_hit_tokens = len(found) + len(slots), len(found) * self._pool.block_size
        seq.num_computed_tokens = num_found * self._pool.block_size
        if slots and slots[-1] == num_found - 1:  # it may be partial
            seq.num_computed_tokens = min(seq.num_computed_tokens, self.swap.num_saved_tokens(seq))
        seq.num_thin_blocks = found.num_thin
        seq.num_published_blocks = next((n for n in range(num_found) if n not in found.hits), num_found)
        if not seq.has_begun and self.known.looks_up(seq):
            self.prefix_queries += seq.num_prompt_tokens
            self.prefix_hits += min(num_hit_tokens, seq.num_prompt_tokens)
        if seq.num_output_tokens == 0:
            seq.num_cached_tokens = min(num_hit_tokens, seq.num_cached_tokens) if seq.has_begun else num_hit_tokens
        seq.has_begun = True

    # --- steps ------------------------------------------------------------------------------------------------------

    def begin(self, rows: list[BatchRow]) -> Batch | None:
        """The batch of these rows, with the copies that it begins with; None where there is nothing to do."""
        if not rows and not self.swap.out and not self.swap.into:
            return self.cache.begin(None)
        out, into = self.swap.begin()
        swap_out = [(self._pool.in_copies(block), slot) for block, slot in out]
        swap_in = [(slot, self._pool.in_copies(block)) for slot, block in into]
        copies: list[tuple[BlockId, BlockId]] = []
        if rows:
            copies, self._copies = self._copies, []
        self._copying = [source for source, _ in copies]
        copies = [(source, self._pool.in_copies(target)) for source, target in copies]
        self._reused.clear()
        return self.cache.begin(Batch(rows, copies, swap_out, swap_in, may_postpone=True))

    def end(self) -> None:
        """The step has ended: what it touched goes back."""
        self.swap.end()
        self.cache.end()
        for blocks in (self._copying, self._outgoing, self._held):
            self._pool.free(blocks)
        self._copying, self._outgoing, self._held = [], [], []

    def references(self) -> list[list[BlockId]]:
        """Return the references that copies hold, beside those of the sequences."""
        return [
            [source for source, _ in self._copies],
            self._copying,
            self._outgoing,
            self._held,
            self.cache.references(),
        ]

    def check(self) -> None:
        """Assert that blocks and slots are all accounted for."""
        self.cache.check()
        self.swap.check()
