"""Answers of decode workers: the right to write, for how long it lasts, and when it is not needed any more.

    KVOpened ─> SHIPPING      KVRenewed ─> later deadlines      KVRefused, CancelKV, KVDone ─> the shipment ends

An answer about a shipment that has ended is nobody's, except KVDone: it says that our last word was heard.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...common.clock import Clock
from ...wire.codec import DecodeToPrefill
from ...wire.handoff import CancelKV, KVDone, KVOpened, KVRefused, KVRenewed
from .closings import Closings
from .endings import Endings
from .leases import Leases
from .opening import Opening
from .posting import Posting
from .shipment import Shipment, ShipmentState


class Answers:
    """One source rank's. Every rank gets the answers that rank 0 asked for."""

    def __init__(
        self,
        shipments: Mapping[int, Shipment],
        opening: Opening,
        posting: Posting,
        leases: Leases,
        closings: Closings,
        endings: Endings,
        clock: Clock,
    ) -> None:
        """`shipments`: the books, by open id."""
        self._shipments = shipments
        self._opening = opening
        self._posting = posting
        self._leases = leases
        self._closings = closings
        self._endings = endings
        self._clock = clock

    def take(self, message: DecodeToPrefill) -> None:
        if isinstance(message, KVRenewed):
            self._on_renewed(message)
            return
        if isinstance(message, KVDone):
            self._closings.acked(message.open_id)
        shipment = self._shipments.get(message.open_id)
        if shipment is None or shipment.grant.grant_id != message.grant_id:
            return  # it ended: nobody waits for an answer
        match message:
            case KVOpened():
                self._on_opened(shipment, message)
            case KVRefused(reason=reason):
                if shipment.state is ShipmentState.OPENING:
                    self._endings.end(shipment, clean=True, reason=f"refused: {reason}")
            case CancelKV():
                if shipment.state is ShipmentState.TOLD:
                    self._posting.tell(shipment, self._clock.now())
                    # It was given up over there before it arrived, perhaps with the agent that would hear of it.
                    self._closings.add(shipment, self._clock.now(), "everything was written", clean=True)
                self._endings.stop(shipment, "cancelled by the decode worker")
            case KVDone():
                self._endings.needed_no_more(shipment, "the decode worker needs nothing more")

    def _on_opened(self, shipment: Shipment, message: KVOpened) -> None:
        if shipment.state is not ShipmentState.OPENING:
            return
        now = self._clock.now()
        reason = self._opening.take(shipment, message, now)
        if reason is None:
            shipment.advance(ShipmentState.SHIPPING, now)
        else:
            self._endings.end(shipment, clean=True, reason=reason)

    def _on_renewed(self, message: KVRenewed) -> None:
        now = self._clock.now()
        for grant_id, open_id, lease_s in message.opens:
            shipment = self._shipments.get(open_id)
            if shipment is None or shipment.grant.grant_id != grant_id:
                continue
            if lease_s <= 0:
                self._endings.needed_no_more(shipment, "the decode worker no longer knows the handoff")
            else:
                self._leases.extend(shipment, lease_s, now)
        for peer in {(grant_id.worker_id, grant_id.incarnation) for grant_id, _, _ in message.opens}:
            self._leases.answered(peer)
