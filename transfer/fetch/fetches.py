"""Prefixes that this worker reads from others into its own prefix cache, part by part, before it computes the rest.

    begin ─> KVFetch ─KVFetchable─> read on all ranks ─done, lease not over─> [sums agree] ─> published ─> next part ...
               │                       │                                         │                        └─> ended
               └─refused, no answer────┴─a read failed, lease or patience over───┴─other sums─> ended with what there is

A prompt waits for its fetch and begins with whatever is in the cache then: a fetch that fails costs time, and what it
did not bring is computed. The cache is all that the two share, so a fetch holds no block that a prompt could wait for
longer than a lease lasts.

When a read is done on all ranks we look at the clock: until then the blocks were pinned over there (`lending.py`), so
that what we have is what was asked for, whatever happened meanwhile to either process. Blocks of ours into which
something may still land belong to nobody else: they go back when every rank says that it is over (`reader.py`).

Pure over BlockPool and Clock, for all ranks. The caller holds the worker's lock.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ...common import failpoints
from ...common.clock import Clock
from ...common.messages import (
    FetchFrom,
    KVFetch,
    KVFetchable,
    KVFetchDone,
    KVFetchRefused,
    KVFetchSums,
    Message,
    RegionInfo,
)
from ...common.request import BlockId
from ...kvcache.blocks import BlockPool
from ..protocol.handoff import Endpoint, check_compatible
from ..protocol.rank_messages import ReadOutcome

ANSWER_WITHIN_S = 0.5
PART_BYTES = 128 << 20  # of all ranks, read under one lease: what is here of a prefix is of use if the rest fails
MAX_PART_BLOCKS = 4096
_USABLE_LEASE_SHARE = 0.95  # clocks run up to a thousandth apart


class Reading(Protocol):
    """The readers of all ranks."""

    def read(
        self,
        fetch_id: int,
        kv_address: str,
        ranks: tuple[RegionInfo, ...],
        ours: tuple[BlockId, ...],
        theirs: tuple[BlockId, ...],
        wants_sums: bool,
    ) -> None:
        """Each rank reads from the one with its number; answered by `Fetches.on_read` of each."""
        ...

    def give_up(self, fetch_id: int) -> None:
        """Every rank that is not done answers, in time, that it is over."""
        ...


@dataclass(slots=True, eq=False)
class _Part:
    """Neighbouring blocks that are asked for together."""

    fetch_id: int
    first: int  # place of the first in the prompt
    hashes: list[bytes]
    asked_at: float
    kv_address: str
    deadline: float | None = None  # of the lease; None: not answered
    blocks: list[BlockId] = field(default_factory=list)  # ours
    has_checksums: bool = False
    waits_for: set[int] = field(default_factory=set)  # ranks that may still write into the blocks
    is_here: bool = False  # read on all ranks within the lease
    our_sums: dict[int, bytes] = field(default_factory=dict)  # by rank
    their_sums: dict[int, bytes] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Fetch:
    """One prompt's."""

    key: str
    source: FetchFrom
    hashes: Sequence[bytes]  # of all that is to be here
    on_end: Callable[[], None]
    began_at: float
    held: list[BlockId] = field(default_factory=list)  # leading blocks that we have, pinned until the end
    num_found: int = 0  # leading blocks that need not be asked for
    num_bytes: int = 0
    is_spare: bool = False  # another worker keeps the prompt's KV
    part: _Part | None = None


class Fetches:
    """Owner of the fetches of one worker."""

    def __init__(
        self,
        *,
        pool: BlockPool,
        endpoint: Endpoint,
        clock: Clock,
        reading: Reading,
        to_peer: Callable[[str, Message], None],
        has_checksums: bool = False,
        needs_checksums: bool = False,
        reserve: Callable[[], int] = lambda: 0,
        also_held: Callable[[bytes], bool] = lambda block_hash: False,
        part_bytes: int = PART_BYTES,
    ) -> None:
        """`reserve()`: blocks that must stay free or evictable. `also_held`: in a lower tier, not to be fetched."""
        self._pool = pool
        self._endpoint = endpoint
        self._clock = clock
        self._reading = reading
        self._to_peer = to_peer
        self._has_checksums = has_checksums
        self._needs_checksums = needs_checksums
        self._reserve = reserve
        self._also_held = also_held
        self._part_blocks = min(MAX_PART_BLOCKS, max(1, part_bytes // endpoint.spec.block_bytes()))
        self._fetches: dict[str, _Fetch] = {}  # by key
        self._parts: dict[int, _Fetch] = {}  # by fetch id
        self._given_up: dict[int, _Part] = {}  # something may still land in their blocks
        self.num_fetches = 0
        self.num_failures = 0
        self.num_bytes = 0  # of blocks that were used, on all ranks
        self.seconds = 0.0  # of fetches that ended
        self.stale_messages = 0

    def __len__(self) -> int:
        return len(self._fetches) + len(self._given_up)

    @property
    def num_given_up_blocks(self) -> int:
        """In quarantine, as it were."""
        return sum(len(part.blocks) for part in self._given_up.values())

    # --- prompts --------------------------------------------------------------------------------------------------

    def begin(
        self, key: str, hashes: Sequence[bytes], source: FetchFrom, on_end: Callable[[], None], *, spare: bool = False
    ) -> bool:
        """Fetch what is missing of these leading blocks; `on_end` is called once, later. False: nothing is missing.

        `key` names the prompt. One that is known already is fetched for it alone.
        """
        self.cancel(key)
        size = self._endpoint.spec.block_size
        fetch = _Fetch(key, source, hashes[: source.num_tokens // size], on_end, self._clock.now(), is_spare=spare)
        self._skip_held(fetch)
        if fetch.num_found == len(fetch.hashes) or not self._room():
            self._pool.free(fetch.held)
            return False
        self.num_fetches += 1
        self._fetches[key] = fetch
        self._ask(fetch)
        return True

    def cancel(self, key: str) -> None:
        """The prompt is not wanted any more: `on_end` is not called. Idempotent."""
        fetch = self._fetches.get(key)
        if fetch is not None:
            fetch.on_end = _nobody_waits
            self._end(fetch, has_failed=False)

    def _skip_held(self, fetch: _Fetch) -> None:
        """Take what has come into the cache, and leave out what is not to be asked for."""
        while fetch.num_found < len(fetch.hashes):
            block_hash = fetch.hashes[fetch.num_found]
            found = self._pool.match_prefix([block_hash])
            if not found and not self._also_held(block_hash):
                return
            self._pool.pin(found)
            fetch.held += found
            fetch.num_found += 1

    def _room(self) -> int:
        """Blocks that a part may take."""
        return max(0, min(self._part_blocks, self._pool.num_free_blocks - self._reserve()))

    def _ask(self, fetch: _Fetch) -> None:
        """For the next part."""
        endpoint, first = self._endpoint, fetch.num_found
        hashes = list(fetch.hashes[first : first + self._room()])
        if not hashes:
            self._end(fetch, has_failed=True)
            return
        part = _Part(secrets.randbits(63), first, hashes, self._clock.now(), fetch.source.kv_address)
        fetch.part = part
        self._parts[part.fetch_id] = fetch
        self._to_peer(
            part.kv_address,
            KVFetch(
                fetch_id=part.fetch_id,
                hashes=b"".join(hashes),
                spec=endpoint.spec,
                version=endpoint.version,
                transport=endpoint.transport,
                tp_size=endpoint.tp_size,
                wants_checksums=self._has_checksums,
            ),
        )

    # --- answers --------------------------------------------------------------------------------------------------

    def on_message(self, message: KVFetchable | KVFetchSums | KVFetchRefused) -> None:
        """From the worker that was asked."""
        fetch = self._parts.get(message.fetch_id)
        if fetch is None or fetch.part is None:
            self.stale_messages += 1
            return
        part = fetch.part
        match message:
            case KVFetchRefused():
                self._end(fetch, has_failed=True)
            case KVFetchSums(rank=rank, checksum=checksum):
                part.their_sums[rank] = checksum
                self._settle(fetch, part)
            case KVFetchable() if part.deadline is None:
                self._on_fetchable(fetch, part, message)

    def _on_fetchable(self, fetch: _Fetch, part: _Part, message: KVFetchable) -> None:
        part.deadline = part.asked_at + _USABLE_LEASE_SHARE * message.lease_s
        part.has_checksums = message.has_checksums
        count = len(message.block_ids)
        is_fit = self._check(part, message) is None and (message.has_checksums or not self._needs_checksums)
        if not is_fit or count > self._pool.num_free_blocks - self._reserve() or self._clock.now() >= part.deadline:
            self._end(fetch, has_failed=True)
            return
        part.blocks = self._pool.allocate(count)
        part.waits_for = set(range(self._endpoint.tp_size))
        self._reading.read(
            part.fetch_id, part.kv_address, message.ranks, tuple(part.blocks), message.block_ids, part.has_checksums
        )

    def _check(self, part: _Part, message: KVFetchable) -> str | None:
        """Why nothing can be read; None: it can."""
        spec, tp_size = self._endpoint.spec, self._endpoint.tp_size
        ranks, blocks = message.ranks, message.block_ids
        if [region.rank for region in ranks] != list(range(tp_size)):
            return f"ranks {[region.rank for region in ranks]}, want 0 to {tp_size - 1}"
        for region in ranks:
            theirs = Endpoint(spec, self._endpoint.version, region.transport, tp_size)
            misfit = check_compatible(self._endpoint, theirs)
            if misfit is not None or region.page_bytes != spec.page_bytes(tp_size):
                return misfit or f"pages of {region.page_bytes} bytes at {region.agent}"
        num_blocks = min(region.num_blocks for region in ranks)
        if not 0 < len(blocks) <= len(part.hashes) or len(set(blocks)) < len(blocks) or max(blocks) >= num_blocks:
            return f"block ids are not up to {len(part.hashes)} distinct ids below {num_blocks}"
        return None

    def on_read(self, rank: int, fetch_id: int, outcome: ReadOutcome, sums: bytes) -> None:
        """One rank's reads of a part."""
        given_up = self._given_up.get(fetch_id)
        if given_up is not None:
            if outcome is not ReadOutcome.FAILED:
                self._rank_over(given_up, rank)
            return
        fetch = self._parts.get(fetch_id)
        if fetch is None or fetch.part is None:
            return
        part = fetch.part
        if outcome is not ReadOutcome.FAILED:
            part.waits_for.discard(rank)
        if outcome is not ReadOutcome.DONE:
            self._end(fetch, has_failed=True)
            return
        part.our_sums[rank] = sums
        if not part.waits_for:
            if failpoints.armed:
                failpoints.hit("fetch.done")
            assert part.deadline is not None
            part.is_here = self._clock.now() < part.deadline
            if part.is_here:
                self._settle(fetch, part)
            else:
                self._end(fetch, has_failed=True)

    def _settle(self, fetch: _Fetch, part: _Part) -> None:
        """What is here within its lease, and is what lies there, is published."""
        if not part.is_here:
            return
        if part.has_checksums:
            if len(part.their_sums) < self._endpoint.tp_size:
                return
            if part.their_sums != part.our_sums:
                self._end(fetch, has_failed=True)
                return
        for block, block_hash in zip(part.blocks, part.hashes, strict=False):
            self._pool.publish(block, block_hash, spare=fetch.is_spare)
        self._over(fetch, part)
        fetch.held += part.blocks
        fetch.num_found += len(part.blocks)
        fetch.num_bytes += len(part.blocks) * self._endpoint.spec.block_bytes()
        has_all = len(part.blocks) == len(part.hashes)
        self._skip_held(fetch)
        if fetch.num_found == len(fetch.hashes):
            self._end(fetch, has_failed=False)
        elif has_all:
            self._ask(fetch)
        else:
            self._end(fetch, has_failed=True)  # the next one is gone over there

    # --- ends -----------------------------------------------------------------------------------------------------

    def on_peer_lost(self, kv_address: str) -> None:
        """The control connection ended: an answer may have been lost with it."""
        for fetch in list(self._fetches.values()):
            if fetch.source.kv_address == kv_address:
                self._end(fetch, has_failed=True)

    def tick(self) -> None:
        """Some ten times a second: leases, answers that do not come, prompts that have waited long enough."""
        now = self._clock.now()
        for fetch in list(self._fetches.values()):
            part = fetch.part
            is_late = now - fetch.began_at >= fetch.source.within_s
            if part is not None and part.deadline is None:
                is_late |= now - part.asked_at >= ANSWER_WITHIN_S
            elif part is not None and part.deadline is not None and not part.is_here:
                is_late |= now >= part.deadline
            if is_late:
                self._end(fetch, has_failed=True)

    def _over(self, fetch: _Fetch, part: _Part) -> None:
        """The part is no longer read, or what is read is not used: it need not stay there."""
        del self._parts[part.fetch_id]
        fetch.part = None
        self._to_peer(part.kv_address, KVFetchDone(fetch_id=part.fetch_id))

    def _end(self, fetch: _Fetch, *, has_failed: bool) -> None:
        part = fetch.part
        if part is not None:
            self._over(fetch, part)
            self._give_back(part)
        del self._fetches[fetch.key]
        self._pool.free(fetch.held)
        self.num_failures += has_failed
        self.num_bytes += fetch.num_bytes
        self.seconds += self._clock.now() - fetch.began_at
        fetch.on_end()

    def _give_back(self, part: _Part) -> None:
        """The blocks of a part that is not used, when nothing lands in them any more."""
        if part.waits_for:
            self._given_up[part.fetch_id] = part
            self._reading.give_up(part.fetch_id)
        else:
            self._pool.free(part.blocks)

    def _rank_over(self, part: _Part, rank: int) -> None:
        part.waits_for.discard(rank)
        if not part.waits_for:
            del self._given_up[part.fetch_id]
            self._pool.free(part.blocks)

    def references(self) -> list[list[BlockId]]:
        """All references to blocks of the pool that fetches hold."""
        found = [part.blocks for part in self._given_up.values()]
        for fetch in self._fetches.values():
            found += [fetch.held] if fetch.part is None else [fetch.held, fetch.part.blocks]
        return found

    def check(self) -> None:
        """Assert that the books agree."""
        assert {part_id: fetch.key for part_id, fetch in self._parts.items()} == {
            fetch.part.fetch_id: fetch.key for fetch in self._fetches.values() if fetch.part is not None
        }
        assert all(part.waits_for for part in self._given_up.values())


def _nobody_waits() -> None:
    """The prompt is gone."""
