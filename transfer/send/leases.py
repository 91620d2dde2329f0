"""Leases seen from the prefill side: one KVRenew per decode worker for all of its shipments, some times in a lease.

A lease counts from the time at which the message was sent that it answers, so that we end before the decode worker
does. The next KVRenew to a worker waits for the answer to the one before. Rank 0 asks for all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ...wire.fields import Message
from ...wire.handoff import KVRenew
from ..protocol.leases import usable_until
from .shipment import Shipment, ShipmentState


@dataclass(slots=True, eq=False)
class _Peer:
    """A decode worker with shipments."""

    kv_address: str
    renew_at: float
    sent_at: float | None = None  # of the KVRenew that waits for its answer


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
            if opens:
                peer.sent_at = now
                self._to_peer(peer.kv_address, KVRenew(opens=opens))

    def extend(self, shipment: Shipment, lease_s: float, now: float) -> None:
        """Take the answer to a KVRenew that names it. One that nobody has asked for extends nothing."""
        asked_at = self._asked_at(shipment)
        if asked_at is not None:
            shipment.deadline = max(shipment.deadline, usable_until(asked_at, lease_s))
            shipment.answered_at = now

    def _asked_at(self, shipment: Shipment) -> float | None:
        """A time not after the KVRenew was sent that is answered now.

        Only rank 0 knows it. For the others the answer before is safe: rank 0 asks again only after an answer.
        """
        return self._peers[shipment.peer].sent_at if self._asks else shipment.answered_at

    def answered(self, peer: tuple[str, int]) -> None:
        """Ask it again when its time comes. Every shipment that its answer names was extended before."""
        if peer in self._peers:
            self._peers[peer].sent_at = None

    def peer_lost(self, kv_address: str) -> None:
        """An answer that was under way is lost."""
        for peer in self._peers.values():
            if peer.kv_address == kv_address:
                peer.sent_at = None

    def next_times(self) -> list[float]:
        """Return when `renew` has something to do, unless an answer is waited for."""
        return [peer.renew_at for peer in self._peers.values() if peer.sent_at is None] if self._asks else []
