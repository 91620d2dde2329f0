"""`Endings` ends shipments, and says so: to the worker, to the decode worker, to whoever reads the source blocks.

    stop    given up                              OPENING: over at once; SHIPPING: closes, and waits for what was posted
    fail    what was posted may still land        told as unclean; its writes go on without it
    end     over                                  off the books, and reported by rank 0

What the decode worker has to hear of it, and until when, is in `closings.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from ...common.clock import Clock
from ...wire.workers import TransferReport
from ..protocol.peer_log import PeerLog
from .closings import Closings
from .leases import Leases
from .shipment import Shipment, ShipmentState
from .writes import Writes


class Endings:
    """Moves shipments to CLOSING and ENDED. The only one that takes them off the books."""

    def __init__(
        self,
        shipments: dict[int, Shipment],
        writes: Writes,
        leases: Leases,
        closings: Closings,
        *,
        clock: Clock,
        source_free: Callable[[int], None],
        report: Callable[[int, TransferReport], None] | None,
    ) -> None:
        """`shipments`: the books, by open id, which others only add to.

        `report(open_id, account)`: the shipment has ended; None: another rank reports.
        """
        self._shipments = shipments
        self._writes = writes
        self._leases = leases
        self._closings = closings
        self._clock = clock
        self._source_free = source_free
        self._report = report
        self.num_failures = 0  # shipments that ended with "may still land"
        self._log = PeerLog("shipment_failed")

    def stop(self, shipment: Shipment, reason: str) -> None:
        """Post nothing more. Without an open nothing was posted; else what was posted has to end first."""
        if shipment.state is ShipmentState.OPENING:
            self.end(shipment, clean=True, reason=reason)
        elif shipment.state is ShipmentState.SHIPPING:
            shipment.advance(ShipmentState.CLOSING, self._clock.now())
            shipment.reason = reason
            self._source_free(shipment.open_id)

    def needed_no_more(self, shipment: Shipment, reason: str) -> None:
        """The decode worker has said so: one that told its arrival is over, and needs no last word."""
        if shipment.state is ShipmentState.TOLD:
            self.end(shipment, clean=True, is_known=True)
        self.stop(shipment, reason)

    def lease_over(self, shipment: Shipment) -> None:
        if shipment.state is ShipmentState.TOLD:
            self.end(shipment, clean=True, reason="everything was written")
        self.stop(shipment, "lease over")

    def fail(self, shipment: Shipment, reason: str, *, has_failed: bool = False) -> None:
        """End a shipment whose posts may still land. `has_failed`: nobody will tell when they no longer can."""
        self.num_failures += 1
        kind = "write failed" if has_failed else "write timed out"
        self._log.warn(shipment.peer[0], kind, detail=reason, request_id=shipment.request_id)
        self.end(shipment, clean=False, reason=reason, has_failed=has_failed)

    def end(
        self, shipment: Shipment, *, clean: bool, reason: str = "", has_failed: bool = False, is_known: bool = False
    ) -> None:
        """Take it off the books. `is_known`: the decode worker has said so, and waits for no word of ours."""
        now, was_live = self._clock.now(), shipment.is_live
        if not is_known:
            self._closings.add(shipment, now, reason or shipment.reason, clean=clean, has_failed=has_failed)
        self._writes.disown(shipment)
        shipment.advance(ShipmentState.ENDED, now)
        del self._shipments[shipment.open_id]
        if not any(other.peer == shipment.peer for other in self._shipments.values()):
            self._leases.remove(shipment.peer)
        if was_live:
            self._source_free(shipment.open_id)
        if self._report is not None:
            self._report(shipment.open_id, shipment.report(clean))
