"""The prefix cache over its tiers: what a prompt finds, and the copies with which a step begins to move it.

    find ──> promote ──> begin: copies in, before the step computes ──> end: in its block, published by its owner
    evicted, or soon to be ──> begin: copies out ──> end: found in host memory

How blocks leave the device is told in `demotion.py`, how those on disk come back in `disk_tier.py`.

All decisions are rank 0's; the other ranks carry out the same copies. Used under the worker's lock. Without slots in
host memory this is the block pool and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ..common.batch import Batch, StepOutput
from ..common.kv_spec import KVCacheSpec
from ..common.request import BlockId
from ..common.request import Sequence as TokenSequence
from .blocks import BlockPool
from .copy_costs import CopyCosts
from .demotion import Demotion
from .disk_tier import DiskTier
from .thin import ThinRule, num_thin_of, thin_rule, usable
from .tiers import TierIndex, TierListener


@dataclass(slots=True)
class PrefixHit:
    """A prompt's leading blocks by place: those on the device, and the hashes of those in host memory."""

    hits: dict[int, BlockId] = field(default_factory=dict)
    promoted: dict[int, bytes] = field(default_factory=dict)
    num_thin: int = 0  # leading blocks, up to the last thin one

    def __len__(self) -> int:
        return len(self.hits) + len(self.promoted)

    @property
    def num_ready(self) -> int:
        """Count the leading blocks whose KV is on the device already."""
        return min(self.promoted, default=len(self.hits))


@dataclass(slots=True)
class _Lift:
    """Blocks that are promoted for somebody who reads them from elsewhere."""

    hashes: dict[BlockId, bytes]
    done: Callable[[], None]


class PrefixCache:
    """Around a block pool: `allocate` through here, and `begin` and `end` each step, so that content is kept."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        host: TierIndex | None = None,
        disk: DiskTier | None = None,
        costs: CopyCosts | None = None,
        spec: KVCacheSpec | None = None,
    ) -> None:
        """`host`: its slots are the engine's; with a disk, the one that reads from there come into."""
        self._pool = pool
        self._spec = spec  # None: no layer has a window
        self.host = host if host is not None else TierIndex(0)
        self.disk = disk
        self.costs = costs if costs is not None else CopyCosts()
        self._demotion = Demotion(pool, self.host, self.costs)
        self._into: dict[BlockId, bytes] = {}  # promotions of the step that is being put together
        self._reading: list[bytes] = []
        self._lifts: list[_Lift] = []  # of the step that is being put together
        self._lifting: list[_Lift] = []
        self.num_promoted_blocks = 0

    @property
    def has_tiers(self) -> bool:
        return self.host.num_slots > 0

    def report_to(self, listener: TierListener) -> None:
        """Report to `listener` what comes and goes in the tiers below the device."""
        self.host.report_to(listener, "host")
        if self.disk is not None:
            self.disk.report_to(listener)

    # --- a sequence's blocks -------------------------------------------------------------------------------------

    def find(self, hashes: Sequence[bytes], num_thin: ThinRule | None = None) -> PrefixHit:
        """Find the longest known prefix, as far as promoting is quicker than computing. `num_thin`: None: for whoever
        computes on from there.
        """
        found = self._hit(hashes, self._is_near, num_thin)
        return self._hit(hashes, self._pool.knows, num_thin) if found.promoted and not self._pays(found) else found

    def thin_rule(self, num_tokens: int | None = None) -> ThinRule:
        return thin_rule(self._spec, num_tokens)

    def _is_near(self, name: bytes) -> bool:
        return self._pool.knows(name) or self.has_in_host(name)

    def _hit(self, hashes: Sequence[bytes], has: Callable[[bytes], bool], num_thin: ThinRule | None) -> PrefixHit:
        """Say where what is there lies. Behind the first in host memory others are copied from there as well."""
        names = usable(hashes, has, num_thin or self.thin_rule())
        found = PrefixHit(num_thin=num_thin_of(names, hashes))
        for place, name in enumerate(names):
            block = None if found.promoted and self.has_in_host(name) else self._pool.block_of(name)
            if block is None:
                found.promoted[place] = name
            else:
                found.hits[place] = block
        return found

    def _pays(self, found: PrefixHit) -> bool:
        """Tell whether what is in host memory is copied in sooner than it is computed."""
        return self.costs.copying_pays(len(found.promoted), (len(found) - found.num_ready) * self._pool.block_size)

    def has_below(self, block_hash: bytes) -> bool:
        """Tell whether a tier below the device has the block, from where a hit promotes it."""
        return block_hash in self.host or (self.disk is not None and self.disk.has(block_hash))

    def has_in_host(self, block_hash: bytes) -> bool:
        return self.host.find(block_hash) is not None

    def allocate(self, count: int, num_thin: int = 0) -> list[BlockId]:
        """Take blocks that their owner does not write to before the next step computes: it copies what lay in them."""
        return self._demotion.allocate(count, num_thin)

    def promote(self, found: PrefixHit, table: Sequence[BlockId]) -> None:
        """Copy what lies in host memory into its places of a block table, with the next step."""
        for place, block_hash in found.promoted.items():
            self.host.pin(block_hash)
            self._into[table[place]] = block_hash

    def is_promoting(self, blocks: Iterable[BlockId]) -> bool:
        """Is a copy into one of them waiting for the next step?"""
        return bool(self._into) and any(block in self._into for block in blocks)

    def cancel(self, blocks: Iterable[BlockId]) -> None:
        """Forget the copies into blocks that are given back before their step."""
        if self._into:
            for block in blocks:
                if (block_hash := self._into.pop(block, None)) is not None:
                    self.host.unpin(block_hash)

    def lift(self, hashes: Sequence[bytes], num_thin: int, done: Callable[[], None], *, reserve: int = 0) -> bool:
        """Bring what host memory has of the longest known prefix, of which `num_thin` blocks may be thin, to the device
        with the next step, as cached blocks, and call `done`. `reserve`: what stays free. False: there is nothing.
        """
        found = self.find(hashes, lambda num_blocks: num_thin)
        num_available = self._pool.num_free_blocks - self._pool.num_evictable(found.hits.values())
        if not found.promoted or len(found.promoted) + reserve > num_available:
            return False
        self._pool.pin(found.hits.values())  # or they would make room
        blocks = self.allocate(len(found.promoted))
        self._pool.free(list(found.hits.values()))
        wanted = dict(zip(blocks, found.promoted.values(), strict=True))
        for block, block_hash in wanted.items():
            self.host.pin(block_hash)
            self._into[block] = block_hash
        self._lifts.append(_Lift(wanted, done))
        return True

    # --- the disk ------------------------------------------------------------------------------------------------

    def awaits(self, seq: TokenSequence, hashes: Callable[[], Sequence[bytes]]) -> bool:
        """Is KV of a waiting sequence on its way from the disk, and sooner here than computed? Asks for it once."""
        if self.disk is None or not self._pool.enable_prefix_caching:
            return False
        if not self.disk.knows(seq):
            self.disk.ask(seq, self._missing(hashes()), self._limit_s)
        return self.disk.awaits(seq)

    def _missing(self, hashes: Sequence[bytes]) -> list[bytes]:
        """List the blocks of the longest prefix in any tier that neither the device nor host memory has."""
        disk = self.disk
        assert disk is not None
        names = usable(hashes, lambda name: self._is_near(name) or disk.has(name), self.thin_rule())
        return [name for name in names if not self._is_near(name)]

    def _limit_s(self, num_blocks: int) -> float | None:
        """Return how long so many blocks are worth a wait: as long as computing takes, less copies. None: unknown."""
        costs = self.costs
        if costs.token_s is None:
            return None
        return num_blocks * (self._pool.block_size * costs.token_s - (costs.block_s or 0.0))

    def forget(self, seq: TokenSequence) -> None:
        """Let go of what the sequence waits for: it has its blocks, or it ended."""
        if self.disk is not None:
            self.disk.forget(seq)

    def wake_with(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, from other threads, when the disk has answered: its waiters may be scheduled then."""
        if self.disk is not None:
            self.disk.disk.wake = wake

    def close(self) -> None:
        if self.disk is not None:
            self.disk.disk.close()

    # --- steps ---------------------------------------------------------------------------------------------------

    def begin(self, batch: Batch | None) -> Batch | None:
        """Return the next step with the copies that it begins with. None: there is nothing to do."""
        if not self.has_tiers:
            return batch
        if self.disk is not None:
            self.disk.advance()
        return self._with_copies(batch, self._demotion.copies(batch.num_tokens if batch is not None else 0))

    def idle(self) -> Batch | None:
        """Return a step of copies alone, for an engine that has nothing else to do."""
        if not self.has_tiers:
            return None
        if self.disk is not None:
            self.disk.advance(is_idle=True)
        return self._with_copies(None, self._demotion.idle_copies())

    def _with_copies(self, batch: Batch | None, out: list[tuple[BlockId, int]]) -> Batch | None:
        into, self._into = self._into, {}
        self._lifting += self._lifts
        self._lifts = []
        if not out and not into:
            return batch
        batch = batch if batch is not None else Batch([])
        batch.swap_out += [(self._pool.in_copies(block), slot) for block, slot in out]
        for block, block_hash in into.items():
            slot = self.host.find(block_hash)
            assert slot is not None, "a pinned block was evicted"
            batch.swap_in.append((slot, self._pool.in_copies(block)))
        self._reading += into.values()
        self.num_promoted_blocks += len(into)
        return batch

    def end(self) -> None:
        """Take in the end of the step: what it copied out is found, what it copied in lies on the device as well."""
        self._demotion.end()
        for block_hash in self._reading:
            self.host.unpin(block_hash)
            self.host.keep_shortest(block_hash)
        self._reading = []
        lifted, self._lifting = self._lifting, []
        for lift in lifted:
            for block, block_hash in lift.hashes.items():
                self._pool.publish(block, block_hash)
            self._pool.free(list(lift.hashes))
        for lift in lifted:
            lift.done()

    def observe(self, batch: Batch, output: StepOutput) -> None:
        """Learn from a step what copying and computing cost."""
        self.costs.observe(batch, output)

    # --- what others see -----------------------------------------------------------------------------------------

    @property
    def num_demoted_blocks(self) -> int:
        return self._demotion.num_blocks

    @property
    def num_disk_blocks(self) -> int:
        return len(self.disk.index) if self.disk is not None else 0

    @property
    def num_failures(self) -> int:
        return self.disk.num_failures if self.disk is not None else 0

    @property
    def is_quiet(self) -> bool:
        """Tell whether no copy is planned or under way."""
        return not (self._into or self._reading or self._lifting) and self._demotion.is_quiet

    @property
    def is_settled(self) -> bool:
        """Tell whether no step copies anything before blocks have changed hands."""
        return not self.has_tiers or (not (self._into or self._lifts) and self._demotion.is_settled)

    def references(self) -> list[BlockId]:
        """List the blocks that a step copies out while others own them, or into for nobody who is here."""
        return [*self._demotion.pinned, *(block for lift in (*self._lifts, *self._lifting) for block in lift.hashes)]

    def check(self) -> None:
        """Assert that the books agree."""
        self._pool.check()
        self.host.check()
        if self.disk is not None:
            self.disk.check()
        if self.is_quiet:
            assert self.disk is not None or not self.host.num_pinned
