"""Prefixes that this worker reads from others into its own prefix cache, part by part, before it computes the rest.

    begin ─> ask ─KVFetchable─> read on all ranks ─> check the lease and the sums ─> publish ─> ask for the next part
                                                                                                or end

The states are drawn in `fetch.py`. An end that is a failure has one of the reasons in `FetchFailure`: each is counted,
and logged once for each peer.

A prompt waits for its fetch and begins with whatever is in the cache then: a fetch that fails costs time, and what it
did not bring is computed. The cache is all that the two share, so a fetch holds no block that a prompt could wait for
longer than a lease lasts.

When a read is done on all ranks we look at the clock: until then the blocks were pinned over there (`lending.py`), so
that what we have is what was asked for. Blocks of ours into which something may still land belong to nobody else until
every rank says that it is over (`given_up.py`). Pure over BlockPool and Clock; the caller holds the worker's lock.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence

from ...common import failpoints
from ...common.clock import Clock
from ...common.request import BlockId
from ...kvcache.blocks import BlockPool
from ...kvcache.thin import ThinRule
from ...wire.fetches import KVFetchable, KVFetchDone, KVFetchRefused, KVFetchSums
from ...wire.fields import Message
from ...wire.tasks import FetchFrom
from ..protocol.handoff import Endpoint
from ..protocol.leases import usable_until
from ..protocol.peer_log import PeerLog
from ..protocol.rank_messages import ReadOutcome
from .answers import check_answer, question
from .fetch import Fetch, FetchFailure, FetchState, Part
from .given_up import GivenUp
from .ranks import Reading

# Of all ranks, read under one lease: what is here of a prefix is of use if the rest fails. Each further part is twice
# as large: whoever lends answers between its steps, and a long prefix comes by few answers.
PART_BYTES = 512 << 20
MAX_PART_BLOCKS = 4096
_Call = Callable[[], None]


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
        self._part_blocks = max(1, part_bytes // endpoint.spec.block_bytes())
        self._fetches: dict[str, Fetch] = {}  # by key
        self._parts: dict[int, Fetch] = {}  # by fetch id
        self.given_up = GivenUp(pool)
        self.num_fetches = 0
        self.failures: Counter[FetchFailure] = Counter()
        self.num_bytes = 0  # of blocks that were used, on all ranks
        self.seconds = 0.0  # of fetches that ended
        self._log = PeerLog("prefix_fetch_failed")

    def __len__(self) -> int:
        return len(self._fetches) + len(self.given_up)

    @property
    def num_failures(self) -> int:
        """Fetches that brought less than they were to, for whatever reason."""
        return self.failures.total()

    # --- prompts --------------------------------------------------------------------------------------------------

    def begin(
        self, key: str, hashes: Sequence[bytes], source: FetchFrom, rule: ThinRule, done: _Call, *, spare: bool = False
    ) -> bool:
        """Fetch what is missing of these leading blocks for the prompt `key`, which is then gone on from by `rule`.
        `done` is called once, later. False: nothing is missing.
        """
        self.cancel(key)
        hashes = hashes[: source.num_tokens // self._endpoint.spec.block_size]
        fetch = Fetch(key, source, hashes, done, self._clock.now(), rule(len(hashes)), is_spare=spare)
        self._skip_held(fetch)
        if fetch.num_found == len(fetch.hashes) or not self._room(fetch):
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
            fetch.on_end = lambda: None  # the prompt is gone
            self._end(fetch)

    def _skip_held(self, fetch: Fetch) -> None:
        """Take what has come into the cache, and leave out what is not to be asked for."""
        while forms := fetch.next_forms():
            known = list(filter(self._pool.knows, forms))[:1]
            if not known and not any(map(self._also_held, forms)):
                return
            found = self._pool.match_prefix(known)
            self._pool.pin(found)
            fetch.held += found
            fetch.num_found += 1

    def _room(self, fetch: Fetch) -> int:
        """Count the blocks that the next part may take."""
        most = min(self._part_blocks << fetch.num_parts, MAX_PART_BLOCKS)
        return max(0, min(most, self._pool.num_free_blocks - self._reserve()))

    def _ask(self, fetch: Fetch) -> None:
        """Ask for the next part."""
        hashes = list(fetch.hashes[fetch.num_found : fetch.num_found + self._room(fetch)])
        if not hashes:
            self._fail(fetch, FetchFailure.NO_ROOM)
            return
        part = fetch.part_of(hashes, secrets.randbits(63), self._clock.now())
        self._parts[part.fetch_id] = fetch
        self._to_peer(part.kv_address, question(part, self._endpoint, wants_checksums=self._has_checksums))

    # --- answers --------------------------------------------------------------------------------------------------

    def on_message(self, message: KVFetchable | KVFetchSums | KVFetchRefused) -> None:
        """Take an answer of the worker that was asked."""
        fetch = self._parts.get(message.fetch_id)
        if fetch is None or fetch.part is None:
            return  # it ended
        part = fetch.part
        match message:
            case KVFetchRefused(reason="gone") if fetch.num_parts:
                self._fail(fetch, FetchFailure.EVICTED, f"block {part.first} of {len(fetch.hashes)} is gone there")
            case KVFetchRefused():
                self._fail(fetch, FetchFailure.REFUSED, message.reason)
            case KVFetchSums(rank=rank, checksum=checksum):
                part.their_sums[rank] = checksum
                self._settle(fetch, part)
            case KVFetchable() if fetch.state is FetchState.ASKING:
                self._on_fetchable(fetch, part, message)

    def _on_fetchable(self, fetch: Fetch, part: Part, message: KVFetchable) -> None:
        part.deadline = usable_until(part.asked_at, message.lease_s)
        part.has_checksums = message.has_checksums
        misfit = check_answer(part, message, self._endpoint, needs_checksums=self._needs_checksums)
        if misfit is not None:
            self._fail(fetch, FetchFailure.MISFIT, misfit)
            return
        count = len(message.block_ids)
        part.num_thin = min(part.num_thin, count)
        needed = self._pool.num_needed(count, part.num_thin)
        if needed > self._pool.num_free_blocks - self._reserve():
            self._fail(fetch, FetchFailure.NO_ROOM, f"{needed} blocks, {self._pool.num_free_blocks} are free")
            return
        if self._clock.now() >= part.deadline:
            self._fail(fetch, FetchFailure.LEASE_OVER, "with the answer")
            return
        fetch.advance(FetchState.READING)
        part.blocks = self._pool.allocate(count, part.num_thin)
        part.waits_for = set(range(self._endpoint.tp_size))
        blocks = tuple(part.blocks), message.block_ids
        self._reading.read(part.fetch_id, part.kv_address, message.ranks, *blocks, part.num_thin, part.has_checksums)

    def on_read(self, rank: int, fetch_id: int, outcome: ReadOutcome, sums: bytes) -> None:
        """Take a rank's word about its reads of a part."""
        if fetch_id in self.given_up:
            if outcome is not ReadOutcome.FAILED:
                self.given_up.rank_over(fetch_id, rank)
            return
        fetch = self._parts.get(fetch_id)
        if fetch is None or fetch.part is None:
            return
        part = fetch.part
        if outcome is not ReadOutcome.DONE:
            self._fail(fetch, FetchFailure.READ_FAILED, f"on rank {rank}")
            return
        part.waits_for.discard(rank)
        part.our_sums[rank] = sums
        if not part.waits_for:
            if failpoints.armed:
                failpoints.hit("fetch.done")
            assert part.deadline is not None
            if self._clock.now() >= part.deadline:
                self._fail(fetch, FetchFailure.LEASE_OVER, "with the last byte")
                return
            fetch.advance(FetchState.CHECKING)
            self._settle(fetch, part)

    def _settle(self, fetch: Fetch, part: Part) -> None:
        """Publish what is here within its lease, and is what lies there."""
        if fetch.state is not FetchState.CHECKING:
            return
        if part.has_checksums:
            if len(part.their_sums) < self._endpoint.tp_size:
                return
            if part.their_sums != part.our_sums:
                self._fail(fetch, FetchFailure.OTHER_SUMS, f"blocks {part.first} to {part.first + len(part.blocks)}")
                return
        for place, block in enumerate(part.blocks):
            self._pool.publish(block, part.name(place), spare=fetch.is_spare)
        self._over(fetch, part)
        fetch.num_parts += 1
        fetch.held += part.blocks
        fetch.num_found += len(part.blocks)
        fetch.num_bytes += self._endpoint.spec.worker_bytes(len(part.blocks), self._endpoint.tp_size, part.num_thin)
        self._skip_held(fetch)
        if fetch.num_found == len(fetch.hashes):
            self._end(fetch)
        else:  # also where less came than was asked for: perhaps no more could be lent at once
            fetch.advance(FetchState.ASKING)
            self._ask(fetch)

    # --- ends -----------------------------------------------------------------------------------------------------

    def on_peer_lost(self, kv_address: str) -> None:
        """The control connection ended: an answer may have been lost with it."""
        for fetch in list(self._fetches.values()):
            if fetch.source.kv_address == kv_address:
                self._fail(fetch, FetchFailure.PEER_LOST)

    def tick(self) -> None:
        """Some ten times a second: leases, answers that do not come, prompts that have waited long enough."""
        now = self._clock.now()
        for fetch in list(self._fetches.values()):
            if (failure := fetch.failure_at(now)) is not None:
                self._fail(fetch, failure)

    def _over(self, fetch: Fetch, part: Part) -> None:
        """The part is no longer read, or what is read is not used: it need not stay there."""
        del self._parts[part.fetch_id]
        fetch.part = None
        self._to_peer(part.kv_address, KVFetchDone(fetch_id=part.fetch_id))

    def _fail(self, fetch: Fetch, failure: FetchFailure, detail: str = "") -> None:
        """End a fetch that brings less than it was to."""
        self.failures[failure] += 1
        self._log.warn(fetch.source.worker_id, failure.value, detail=detail, key=fetch.key, held_blocks=fetch.num_found)
        self._end(fetch)

    def _end(self, fetch: Fetch) -> None:
        fetch.advance(FetchState.ENDED)
        part = fetch.part
        if part is not None:
            self._over(fetch, part)
            self._give_back(part)
        del self._fetches[fetch.key]
        self._pool.free(fetch.held)
        self.num_bytes += fetch.num_bytes
        self.seconds += self._clock.now() - fetch.began_at
        fetch.on_end()

    def _give_back(self, part: Part) -> None:
        """The blocks of a part that is not used, when nothing lands in them any more."""
        if part.waits_for:
            self.given_up.add(part)
            self._reading.give_up(part.fetch_id)
        else:
            self._pool.free(part.blocks)

    def references(self) -> list[list[BlockId]]:
        """All references to blocks of the pool that fetches hold."""
        found = self.given_up.references()
        for fetch in self._fetches.values():
            found += [fetch.held] if fetch.part is None else [fetch.held, fetch.part.blocks]
        return found

    def check(self) -> None:
        """Assert that the books agree."""
        assert {part_id: fetch.key for part_id, fetch in self._parts.items()} == {
            fetch.part.fetch_id: fetch.key for fetch in self._fetches.values() if fetch.part is not None
        }
        self.given_up.check()
