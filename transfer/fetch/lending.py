"""The blocks that others may read from this worker: pinned under a lease, at their request.

    KVFetch ─> pinned ─> KVFetchable (lease_s) [─> KVFetchSums of each rank] ─KVFetchDone, or lease over─> unpinned
            └> KVFetchRefused

Reading is one-sided and changes nothing here. The reader looks at its lease after the read: it counts from the question
that it sent, ours from the question's receipt, so what it takes for good was pinned for as long as it was read. That
holds however long either side stands still, and without a word from it: a connection that ends therefore unpins
nothing, and neither does anything else but the reader's word that it will not use what it reads.

Where not all that is asked for may be lent at once, its beginning is. Only published blocks are lent, which nobody
writes to. The states of the other side are in `fetches.py`. Pure over BlockPool and Clock; the caller holds the
worker's lock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...common import failpoints
from ...common.clock import Clock
from ...common.request import BlockId
from ...kvcache.blocks import BlockPool
from ...kvcache.thin import leading
from ...wire.fetches import KVFetch, KVFetchable, KVFetchDone, KVFetchRefused, KVFetchSums
from ...wire.fields import Message
from ...wire.grants import RegionInfo
from ..protocol.handoff import Endpoint, check_compatible

HASH_BYTES = 16
MAX_LENT_SHARE = 0.25  # of the pool: a lent block cannot be evicted


@dataclass(slots=True, eq=False)
class _Lease:
    session: str
    blocks: list[BlockId]
    deadline: float


class Lending:
    """Owner of the pins. Rank 0 lends for all ranks."""

    def __init__(
        self,
        *,
        pool: BlockPool,
        endpoint: Endpoint,
        clock: Clock,
        lease_s: float,
        regions: Callable[[], tuple[RegionInfo, ...]],
        to_peer: Callable[[str, Message], None],
        sum_blocks: Callable[[int, tuple[BlockId, ...], int], None] | None = None,
        needs_checksums: bool = False,
        reserve: Callable[[], int] = lambda: 0,
        lift: Callable[[list[bytes], int, Callable[[], None]], bool] = lambda hashes, num_thin, done: False,
    ) -> None:
        """`regions()`: of the agents through which our pages are read now.

        `sum_blocks(fetch_id, blocks, num_thin)`: begin to make checksums on all ranks, answered by `on_sums`, of which
        the first `num_thin`, or all, are read as thin ones; None: no sums are made. `reserve()`: blocks that must stay
        free or evictable. `lift(hashes, num_thin, done)`: bring what lies in host memory to the device first; False:
        nothing does.
        """
        self._pool = pool
        self._endpoint = endpoint
        self._clock = clock
        self._lease_s = lease_s
        self._regions = regions
        self._to_peer = to_peer
        self._sum_blocks = sum_blocks
        self._needs_checksums = needs_checksums
        self._reserve = reserve
        self._lift = lift
        self._leases: dict[int, _Lease] = {}  # by fetch id
        self._num_lent = 0  # references
        self.num_lent_blocks = 0  # since start

    def __len__(self) -> int:
        """Leases: while there are some, progress is to be made for their readers."""
        return len(self._leases)

    def on_message(self, session: str, message: KVFetch | KVFetchDone) -> None:
        """Take a message that came over the connection `session`."""
        if isinstance(message, KVFetchDone):
            self._end(message.fetch_id)
            return
        if message.fetch_id in self._leases:
            return  # it was answered
        if (refusal := self._refusal(message)) is not None:
            self._refuse(session, message, refusal)
            return
        hashes = _split(message.hashes)[: self._most]
        if not self._lift(hashes, message.num_thin, lambda: self._answer(session, message)):
            self._answer(session, message)

    def _answer(self, session: str, message: KVFetch) -> None:
        if message.fetch_id in self._leases:
            return  # it was asked again meanwhile
        found = self._pool.match_prefix(leading(_split(message.hashes), self._pool.knows, message.num_thin))
        if blocks := self._lendable(found):
            self._lend(session, message, blocks)
        else:
            self._refuse(session, message, "full" if found else "gone")

    def _refuse(self, session: str, message: KVFetch, reason: str) -> None:
        self._to_peer(session, KVFetchRefused(fetch_id=message.fetch_id, reason=reason))

    def _refusal(self, message: KVFetch) -> str | None:
        theirs = Endpoint(message.spec, message.version, message.transport, message.tp_size)
        misfit = check_compatible(self._endpoint, theirs)
        if misfit is not None:
            return misfit
        if message.tp_size != self._endpoint.tp_size:
            return f"{self._endpoint.tp_size} tensor-parallel ranks here, {message.tp_size} there"
        if self._needs_checksums and not message.wants_checksums:
            return "checksum"
        return None

    @property
    def _most(self) -> int:
        """Return how many more blocks may be lent."""
        return int(MAX_LENT_SHARE * self._pool.num_blocks) - self._num_lent

    def _lendable(self, blocks: list[BlockId]) -> list[BlockId]:
        """Return the leading blocks that may be lent: the reader asks for the rest when it has given these back."""
        blocks, spare = blocks[: self._most], self._pool.num_free_blocks - self._reserve()
        if spare < 0:
            return []
        while (excess := self._pool.num_evictable(blocks) - spare) > 0:
            blocks = blocks[:-excess]
        return blocks

    def _lend(self, session: str, message: KVFetch, blocks: list[BlockId]) -> None:
        self._pool.pin(blocks)
        self._num_lent += len(blocks)
        self.num_lent_blocks += len(blocks)
        self._leases[message.fetch_id] = _Lease(session, blocks, self._clock.now() + self._lease_s)
        if failpoints.armed:
            failpoints.hit("fetch.lent")
        sum_blocks = self._sum_blocks if message.wants_checksums else None
        self._to_peer(
            session,
            KVFetchable(
                fetch_id=message.fetch_id,
                lease_s=self._lease_s,
                block_ids=tuple(blocks),
                ranks=self._regions(),
                has_checksums=sum_blocks is not None,
            ),
        )
        if sum_blocks is not None:
            sum_blocks(message.fetch_id, tuple(blocks), message.num_thin)

    def on_sums(self, rank: int, fetch_id: int, checksum: bytes) -> None:
        """One rank has summed the pages of a lease's blocks; after the lease they may have been another's."""
        lease = self._leases.get(fetch_id)
        if lease is not None:
            self._to_peer(lease.session, KVFetchSums(fetch_id=fetch_id, rank=rank, checksum=checksum))

    def tick(self) -> None:
        """Some ten times a second: leases that are over."""
        now = self._clock.now()
        for fetch_id in [fetch_id for fetch_id, lease in self._leases.items() if now >= lease.deadline]:
            self._end(fetch_id)

    def _end(self, fetch_id: int) -> None:
        lease = self._leases.pop(fetch_id, None)
        if lease is not None:
            self._num_lent -= len(lease.blocks)
            self._pool.free(lease.blocks)

    def references(self) -> list[list[BlockId]]:
        """All references to blocks of the pool that leases hold."""
        return [lease.blocks for lease in self._leases.values()]


def _split(hashes: bytes) -> list[bytes]:
    return [hashes[start : start + HASH_BYTES] for start in range(0, len(hashes), HASH_BYTES)]
