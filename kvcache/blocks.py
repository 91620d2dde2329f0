"""The KV block pool: reference counts, the prefix cache and quarantine. Pure Python, no device.

A block is in exactly one state:

    free         no holder, no content worth keeping
    cached       no holder, content known by its hash: a hit, or evicted when free ones run out (LRU); `spare` ones,
                 which another worker keeps, are evicted before all others and go to no other tier
    owned        held by ref_count sequences or reservations
    quarantined  held by nobody, but a remote writer may still write to it: out of use until released

    free + cached + owned + quarantined = num_blocks, after every call (`check`). A cached block that is being copied
    to another tier is `leaving`: a hit as before, but not evicted until the copy has ended.

Hashes are chained: a block's hash covers every token before it, and the chain starts with the model, the adapter and
the tenant's salt, so equal hashes mean equal token prefixes of one tenant under one adapter.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from ..common.errors import CapacityError
from ..common.kv_spec import KVCacheSpec
from ..common.request import BlockId


def hash_blocks(token_ids: Sequence[int], block_size: int, salt: bytes, known: Sequence[bytes] = ()) -> list[bytes]:
    """Return chained hashes of the full blocks of `token_ids`, going on from the `known` leading ones."""
    hashes = list(known)
    previous = hashes[-1] if hashes else hashlib.blake2b(salt, digest_size=16, person=b"kvferry-prefix").digest()
    content = array("i", token_ids[len(hashes) * block_size :]).tobytes()
    num_bytes, blake2b = 4 * block_size, hashlib.blake2b
    for start in range(0, len(content) - num_bytes + 1, num_bytes):
        previous = blake2b(content[start : start + num_bytes], digest_size=16, key=previous).digest()
        hashes.append(previous)
    return hashes


def prefix_salt(spec: KVCacheSpec, cache_salt: bytes, adapter: str = "") -> bytes:
    """Return the bytes that a chain of block hashes begins with: the model and layout, and the tenant's own salt.

    `adapter`: the digest of what changes the model's KV, in hexadecimal digits; empty: nothing does. Fingerprints have
    one length and neither "+" nor a digit is a zero byte, so different arguments give different bytes.
    """
    changed = f"+{adapter}" if adapter else ""
    return (spec.fingerprint + changed).encode() + b"\0" + cache_salt


class CacheListener(Protocol):
    """Hears what begins and ceases to be found."""

    def stored(self, block_hash: bytes) -> None: ...

    def evicted(self, block_hash: bytes) -> None: ...


class _Nobody:
    """Implements `CacheListener`."""

    def stored(self, block_hash: bytes) -> None:
        """Nobody wants to know."""

    evicted = stored


class BlockPool:
    """Hands out block ids. Not thread-safe: its owner holds one lock around scheduler and pool."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.listener: CacheListener = _Nobody()
        self.num_blocks = self.num_ids = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._free: list[BlockId] = list(range(num_blocks - 1, -1, -1))  # taken from the end
        self._cached: OrderedDict[BlockId, None] = OrderedDict()  # least recently used first
        self._resting: OrderedDict[BlockId, None] = OrderedDict()  # cached as well: the spare ones, in the same order
        self._spare: set[BlockId] = set()  # published ones that another worker keeps, held or not
        self._ref_counts = [0] * num_blocks
        self._hash_of: dict[BlockId, bytes] = {}
        self._block_of: dict[bytes, BlockId] = {}
        self._quarantined: set[BlockId] = set()
        self._leaving: dict[BlockId, None] = {}  # least recently used first
        self.on_evicted: Callable[[BlockId, bytes], None] | None = None  # its content may be overwritten from now on
        self.displaced: dict[BlockId, bytes] = {}  # whose content is wanted yet, for as long as their owners have them
        self.version = 0  # how often the order of eviction has changed

    @property
    def num_free_blocks(self) -> int:
        """Count the blocks that `allocate` can hand out now: free ones and evictable ones."""
        return len(self._free) + len(self._cached) + len(self._resting)

    @property
    def num_cached_blocks(self) -> int:
        return len(self._cached) + len(self._resting) + self.num_leaving_blocks

    @property
    def num_leaving_blocks(self) -> int:
        """Count the blocks that are leaving and that nobody holds."""
        return sum(self._ref_counts[block] == 0 for block in self._leaving)

    @property
    def num_quarantined_blocks(self) -> int:
        return len(self._quarantined)

    @property
    def num_owned_blocks(self) -> int:
        return self.num_blocks - self.num_free_blocks - self.num_leaving_blocks - len(self._quarantined)

    def ref_count(self, block_id: BlockId) -> int:
        return self._ref_counts[block_id]

    num_shares = 1  # thin blocks that lie in a whole one's memory

    def is_thin(self, block_id: BlockId) -> bool:
        """Tell whether a block shares its memory with others, which have what it lacks (`frame_pool.py`)."""
        return False

    def in_copies(self, block_id: BlockId) -> int:
        """Return what copies to host memory and back call a block: `~block_id` where it is thin (`is_thin`)."""
        return ~block_id if self.is_thin(block_id) else block_id

    def num_needed(self, count: int, num_thin: int = 0, hits: Iterable[BlockId] = ()) -> int:
        """Count the free blocks that `allocate` would take now, if `hits` were pinned."""
        return count

    def num_frames(self, count: int, num_thin: int) -> int:
        """Count the whole blocks whose memory so many take, `num_thin` of them thin."""
        return count

    def num_freed_by(self, blocks: Iterable[BlockId]) -> int:
        """Count the free blocks that there will be more where one reference to each of these is given back."""
        return sum(self._ref_counts[block] == 1 for block in blocks)

    def allocate(self, count: int, num_thin: int = 0) -> list[BlockId]:
        """Take `count` blocks with one reference each, the first `num_thin` of them for what is thin; evict the least
        recently used cached ones if it must.
        """
        if count > self.num_free_blocks:
            raise CapacityError(f"need {count} blocks, {self.num_free_blocks} of {self.num_blocks} are free")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            assert self._ref_counts[block] == 0, block
            self._ref_counts[block] = 1
        return blocks

    def _evict(self) -> BlockId:
        is_spare = bool(self._resting)
        block, _ = (self._resting or self._cached).popitem(last=False)
        block_hash = self._hash_of.pop(block)
        del self._block_of[block_hash]
        self._spare.discard(block)
        self.version += 1
        if self.on_evicted is not None and not is_spare:
            self.on_evicted(block, block_hash)
        self.listener.evicted(block_hash)
        return block

    def knows(self, block_hash: bytes) -> bool:
        return block_hash in self._block_of

    def block_of(self, name: bytes) -> BlockId | None:
        """Return the published block of this name. Takes no reference: see `pin`."""
        return self._block_of.get(name)

    def published(self) -> Iterable[bytes]:
        """Return the names of all blocks that can be found."""
        return self._block_of.keys()

    def match_prefix(self, names: Iterable[bytes]) -> list[BlockId]:
        """Return the blocks of these names up to the first that is not known. Takes no reference: see `pin`."""
        blocks = list[BlockId]()
        for name in names:
            if (block := self._block_of.get(name)) is None:
                break
            blocks.append(block)
        return blocks

    def num_evictable(self, blocks: Iterable[BlockId]) -> int:
        """Count those of `blocks` that are free now and would not be once pinned."""
        return sum(block in self._cached or block in self._resting for block in blocks)

    def pin(self, blocks: Iterable[BlockId]) -> None:
        """Add a reference to each of `blocks`, which are cached or owned."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                if block not in self._leaving:
                    del (self._resting if block in self._spare else self._cached)[block]
                self.version += 1
            self._ref_counts[block] += 1

    def free(self, blocks: Sequence[BlockId]) -> None:
        """Give back one reference to each of `blocks`, a prefix of some sequence in token order.

        Later blocks become evictable first: a prefix is useless without what stands before it.
        """
        for block in reversed(blocks):
            assert self._ref_counts[block] > 0, f"block {block} freed twice"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0 and block not in self._leaving:
                self.displaced.pop(block, None)  # whoever gets it next may write to it at once
                self._rest(block)

    def _rest(self, block: BlockId) -> None:
        """Put away a block that nobody holds any more."""
        if block in self._hash_of:
            (self._resting if block in self._spare else self._cached)[block] = None
            self.version += 1
        else:
            self._free.append(block)

    # --- copies to other tiers -----------------------------------------------------------------------------------

    def coldest(self) -> Iterator[bytes]:
        """Yield the hashes of the cached blocks, the next to be evicted first."""
        return (self._hash_of[block] for block in self._cached)

    def cached_block(self, block_hash: bytes) -> BlockId | None:
        """Return the block of this content, if it is cached: held by nobody, evicted when room is needed."""
        block = self._block_of.get(block_hash)
        return block if block in self._cached else None

    def hold(self, blocks: Iterable[BlockId]) -> None:
        """Keep these cached blocks, which are being copied, from being evicted until `unhold`."""
        for block in blocks:
            del self._cached[block]
            self._leaving[block] = None

    def unhold(self) -> None:
        """Let go of the blocks whose copies have ended: each is where it was in the order of eviction."""
        leaving, self._leaving = self._leaving, {}
        for block in reversed(leaving):
            if self._ref_counts[block] == 0:
                if block in self._hash_of:
                    resting = self._resting if block in self._spare else self._cached
                    resting[block] = None
                    resting.move_to_end(block, last=False)
                else:
                    self._free.append(block)

    def is_published(self, block_id: BlockId) -> bool:
        return block_id in self._hash_of

    def publish(self, block_id: BlockId, block_hash: bytes, *, spare: bool = False) -> None:
        """Have a full, owned block found from now on. The first block of a hash stays the one that is.

        `spare`: another worker keeps it.
        """
        assert self._ref_counts[block_id] > 0, block_id
        if self.enable_prefix_caching and block_hash not in self._block_of and block_id not in self._hash_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash
            if spare:
                self._spare.add(block_id)
            self.listener.stored(block_hash)

    def keep(self, blocks: Iterable[BlockId]) -> None:
        """Make these owned blocks spare no more: this worker is the one that keeps them."""
        if self._spare:
            self._spare.difference_update(blocks)

    def is_spare(self, block_id: BlockId) -> bool:
        return block_id in self._spare

    def forget(self, block_id: BlockId) -> None:
        """Unpublish an owned block that gets another content: it is found no more."""
        block_hash = self._hash_of.pop(block_id, None)
        if block_hash is not None:
            del self._block_of[block_hash]
            self._spare.discard(block_id)
            self.listener.evicted(block_hash)

    def quarantine(self, blocks: Iterable[BlockId]) -> None:
        """Take owned, unshared, unpublished blocks out of use: a remote writer may still write to them."""
        for block in blocks:
            assert self._ref_counts[block] == 1 and block not in self._hash_of, block
            self._ref_counts[block] = 0
            self._quarantined.add(block)

    def release_quarantine(self, blocks: Iterable[BlockId]) -> None:
        """Free blocks whose writer has ended cleanly or is fenced."""
        for block in blocks:
            self._quarantined.remove(block)
            self._free.append(block)

    def check(self) -> None:
        """Assert block conservation and the books' agreement with each other."""
        owned = {block for block, count in enumerate(self._ref_counts) if count > 0}
        free, cached, resting, hashed = set(self._free), set(self._cached), set(self._resting), set(self._hash_of)
        leaving, idle = self._leaving.keys() - owned, cached | resting
        states = [free, idle | leaving, owned, self._quarantined]
        assert not leaving & idle and resting <= self._spare <= hashed and not self._spare & cached
        assert sum(map(len, states)) == self.num_blocks == len(set().union(*states)), "a block is lost or doubled"
        assert len(self._free) == len(free), "a block is free twice"
        assert min(self._ref_counts, default=0) >= 0 and self.displaced.keys() <= owned
        assert {h: b for b, h in self._hash_of.items()} == self._block_of
        assert cached <= hashed and not (free | self._quarantined) & hashed
