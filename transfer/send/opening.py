"""An opening asks a decode worker for the right to write, and takes its answer.

    begin ─> ask ─KVOpen─> ... ─KVOpened─> take: the agents that it names are connected to, before its lease is over

KVOpen says what the decode worker has to know of us: which life of which worker writes, what must fit on both sides,
and which processes of ours may copy into its memory by themselves. Rank 0 sends it for all ranks; every rank gets the
answer. An agent over there is connected to when its worker has answered: over a dead link that would hold up everybody
for minutes.
"""

from __future__ import annotations

from collections.abc import Callable

from ...wire.fields import Message
from ...wire.grants import GrantInfo, ProcessMark
from ...wire.handoff import KVOpen, KVOpened
from ..protocol.handoff import Endpoint, open_mac
from ..protocol.leases import usable_until
from .posting import Posting
from .shipment import Shipment


class Opening:
    """One source rank's way from a grant to the right to write."""

    def __init__(
        self,
        posting: Posting,
        endpoint: Endpoint,
        *,
        rank: int,
        worker_id: str,
        incarnation: int,
        processes: tuple[ProcessMark, ...],
        has_checksums: bool,
        lease_s: float,
        to_peer: Callable[[str, Message], None],
    ) -> None:
        """`lease_s`: for how long an answer is waited for."""
        self._posting = posting
        self._endpoint = endpoint
        self._rank = rank
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._processes = processes
        self._has_checksums = has_checksums
        self._lease_s = lease_s
        self._to_peer = to_peer

    def begin(self, open_id: int, request_id: str, attempt: int, grant: GrantInfo, now: float) -> Shipment:
        """Make a shipment that may write once `ask` is answered."""
        targets = self._posting.targets(grant)
        return Shipment(open_id, request_id, attempt, grant, targets, now, usable_until(now, self._lease_s), now)

    def ask(self, shipment: Shipment) -> None:
        """Send KVOpen, on rank 0."""
        if self._rank != 0:
            return
        endpoint, grant = self._endpoint, shipment.grant
        message = KVOpen(
            grant_id=grant.grant_id,
            open_id=shipment.open_id,
            mac=open_mac(grant, shipment.request_id, shipment.attempt),
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            spec=endpoint.spec,
            version=endpoint.version,
            transport=endpoint.transport,
            tp_size=endpoint.tp_size,
            processes=self._processes,
            has_checksums=self._has_checksums,
        )
        self._to_peer(grant.kv_address, message)

    def take(self, shipment: Shipment, message: KVOpened, now: float) -> str | None:
        """Go by the answer. Say why nothing can be written; None: it can."""
        shipment.deadline = usable_until(shipment.answered_at, message.lease_s)
        shipment.answered_at = now
        reason = self._posting.move(shipment, message)
        if reason is None:
            reason = self._posting.connect(shipment)
        if reason is None and now >= shipment.deadline:
            reason = "KVOpened came after its lease"
        return reason
