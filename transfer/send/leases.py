"""Leases seen from the prefill side: a decode worker is asked for all of its shipments at once, some times in a lease.

A lease counts from the time at which the message was sent that it answers, so that we end before the decode worker
does. A KVRenew names so many opens at most that it and its answer fit into a frame. The next ones to a worker wait for
the answers to those before. Rank 0 asks for all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ...wire.fields import Message
from ...wire.handoff import KVRenew
from ..protocol.leases import usable_until
from .shipment import Shipment, ShipmentState

MAX_OPENS = 200  # of one message, whose frame is bounded (`links.py`), however long the name of a worker


@dataclass(slots=True, eq=False)
class _Peer:
    """A decode worker with shipments."""

    kv_address: str
    renew_at: float
    sent_at: float | None = None  # of the KVRenews that wait for answers
    num_unanswered: int = 0  # KVRenews


class Leases:
    """One source rank's. Knows the decode workers that shipments go to, by worker id and incarnation."""

    def __init__(self, rank: int, every_s: float, to_peer: Callable[[str, Message], None]) -> None:
        self._asks = rank == 0
        self._every_s = every_s
        self._to_peer = to_peer
        self._peers: dict[tuple[str, int], _Peer] = {}

    def add(self, shipment: Shipment, now: float) -> None:
        self._peers.setdefault(shipment.peer, _Peer(shipment.grant.kv_address, renew_at=now + self._every_s))

    def remove(self, peer: tuple[str, int]) -> None:
        """Forget a worker whose last shipment has ended."""
        del self._peers[peer]

    def renew(self, shipments: Iterable[Shipment], now: float) -> None:
        """Ask for those whose time has come."""
        if not self._asks:
            return
        for key, peer in self._peers.items():
            if now < peer.renew_at or peer.sent_at is not None:
                continue
            peer.renew_at = now + self._every_s
            opens = tuple(
                (shipment.grant.grant_id, shipment.open_id)
                for shipment in shipments
                if shipment.peer == key and shipment.state in (ShipmentState.SHIPPING, ShipmentState.TOLD)
            )
            for first in range(0, len(opens), MAX_OPENS):
                peer.sent_at = now
                peer.num_unanswered += 1
                self._to_peer(peer.kv_address, KVRenew(opens=opens[first : first + MAX_OPENS]))

    def extend(self, shipment: Shipment, lease_s: float, now: float) -> None:
        """Take the answer to a KVRenew that names it. One that nobody has asked for extends nothing."""
        asked_at = self._asked_at(shipment)
        if asked_at is not None:
            shipment.deadline = usable_until(asked_at, lease_s)
            shipment.answered_at = now

    def _asked_at(self, shipment: Shipment) -> float | None:
        """A time not after the KVRenew was sent that is answered now.

        Only rank 0 knows it. For the others the answer before is safe: rank 0 asks again only after an answer.
        """
        return self._peers[shipment.peer].sent_at if self._asks else shipment.answered_at

    def answered(self, peer: tuple[str, int]) -> None:
        """Ask it again when its time comes, if this was its last answer, whose shipments were extended before."""
        found = self._peers.get(peer)
        if found is not None and found.num_unanswered:
            found.num_unanswered -= 1
            if not found.num_unanswered:
                found.sent_at = None

    def peer_lost(self, kv_address: str) -> None:
        """Note that what was under way is lost."""
        for peer in self._peers.values():
            if peer.kv_address == kv_address:
                peer.sent_at, peer.num_unanswered = None, 0

    def next_times(self) -> list[float]:
        """Return when `renew` has something to do, unless an answer is waited for."""
        return [peer.renew_at for peer in self._peers.values() if peer.sent_at is None] if self._asks else []
