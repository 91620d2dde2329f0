"""`Posting` makes writes of a shipment's pages, and notifications at the end: where to, in what pieces, how summed.

    targets ─> (KVOpened) move, connect ─> post, piece by piece ─> tell

Whether a shipment posts at all is the sender's decision; each piece is posted within its lease or not at all.
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

from ...common import failpoints
from ...common.clock import Clock
from ...common.errors import TransferError
from ...wire.codec import encode
from ...wire.grants import GrantInfo
from ...wire.handoff import KVArrived, KVOpened
from ..backends.base import TransferBackend
from ..protocol.checksums import PageSums, ShipmentSums
from ..protocol.handoff import Endpoint, check_grant, moved_grant, num_granted_thin
from ..protocol.peer_log import PeerLog
from ..protocol.shards import targets_of
from .shipment import Shipment, Target
from .writes import Writes


class Posting:
    """One source rank's way to decode workers."""

    def __init__(
        self,
        backend: TransferBackend,
        writes: Writes,
        endpoint: Endpoint,
        *,
        rank: int,
        sums: PageSums | None,
        max_write_bytes: int,
    ) -> None:
        self._backend = backend
        self._writes = writes
        self._endpoint = endpoint
        self._rank = rank
        self._shard = endpoint.spec.shard(rank, endpoint.tp_size)
        self._sums = sums
        self._max_write_bytes = max_write_bytes
        self._log = PeerLog("arrival_not_sent")

    def targets(self, grant: GrantInfo) -> list[Target]:
        """The decode ranks that this rank writes to."""
        return [
            Target(region, runs, self._sums_of(grant, region.num_blocks))
            for region, runs in targets_of(self._shard, grant)
        ]

    def _sums_of(self, grant: GrantInfo, num_blocks: int) -> ShipmentSums | None:
        if self._sums is None:
            return None
        return ShipmentSums(grant.spec, grant.block_ids, num_blocks, num_granted_thin(grant))

    def connect(self, shipment: Shipment) -> str | None:
        """Make its targets writable. Say why one of them cannot be; None: they are."""
        try:
            for target in shipment.targets:
                self._writes.connect(shipment.grant.kv_address, target)
        except TransferError as error:
            return str(error)
        return None

    def move(self, shipment: Shipment, message: KVOpened) -> str | None:
        """Go by the regions that the answer names. Why it cannot be; None: it can."""
        grant = moved_grant(shipment.grant, message.ranks)
        if message.generation != grant.ranks[0].generation:
            return f"the decode worker's agents are generation {message.generation}"
        if not message.ranks:
            return None
        reason = check_grant(self._endpoint, grant)
        if reason is None and {region.num_blocks for region in grant.ranks} != {shipment.remote_num_blocks}:
            reason = f"a pool of {grant.ranks[0].num_blocks} blocks, granted were {shipment.remote_num_blocks}"
        if reason is None:
            shipment.targets = self.targets(grant)
        return reason

    def post(self, shipment: Shipment, clock: Clock) -> None:
        """Write what is complete, until its peer has too much in flight or the lease is over. Raises TransferError."""
        for target in shipment.targets:
            while target.num_posted < len(shipment.local_pages):
                end = self._next_piece(shipment, target)
                now = clock.now()
                if end is None or now >= shipment.deadline:
                    return
                self._post_piece(shipment, target, end, now)
                if shipment.first_post_at is None:
                    shipment.first_post_at = now

    def _next_piece(self, shipment: Shipment, target: Target) -> int | None:
        """The end of the next write's pages; None: the peer has too much in flight."""
        start = target.num_posted
        end = min(len(shipment.local_pages), start + max(1, self._max_write_bytes // target.page_bytes))
        return end if self._writes.has_room(shipment.peer, (end - start) * target.page_bytes) else None

    def _post_piece(self, shipment: Shipment, target: Target, end: int, now: float) -> None:
        """One write of the pages up to `end`, which are written once."""
        start, target.num_posted = target.num_posted, end
        local, remote = shipment.local_pages[start:end], shipment.remote_pages[start:end]
        self._writes.post(shipment, target, local, remote, now)
        if self._sums is not None and target.sums is not None:
            target.sums.add(self._sums, _as_pages(local), _as_pages(remote), target.pieces)

    def tell(self, shipment: Shipment, now: float) -> None:
        """KVArrived to every decode rank that this rank wrote to."""
        shipment.announced_at = now
        if failpoints.armed:
            failpoints.hit("transfer.arrived")
        for target in shipment.targets:
            arrived = KVArrived(
                grant_id=shipment.grant.grant_id,
                open_id=shipment.open_id,
                source_rank=self._rank,
                num_tokens=shipment.grant.num_tokens,
                first_tokens=shipment.first_tokens if self._rank == 0 else (),
                num_cached_tokens=shipment.num_cached_tokens,
                tp_size=self._endpoint.tp_size,
                block_ids=shipment.grant.block_ids if target.sums is not None else (),
                checksum=target.sums.to_bytes() if target.sums is not None else b"",
            )
            try:
                self._backend.notify(target.region.agent, encode(arrived))
            except TransferError as error:  # told again until the lease is over; who lives lets it run out as well
                self._log.warn(shipment.peer[0], "notify", detail=str(error))


def _as_pages(pages: array[int]) -> npt.NDArray[np.int32]:
    return np.frombuffer(pages, dtype=np.int32)
