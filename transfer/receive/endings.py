"""`Endings` ends reservations on the decode side, and tells routers and writers.

drop       given up for a reason that its router knows      GRANTED, ARRIVED: free at once; OPEN: doomed
give_up    given up, as nobody may or will open it          GRANTED: free at once
doom       given up while its writer may still write        the blocks go into quarantine
rank_ended, end_doomed                                      ... and out of it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ...common.clock import Clock
from ...common.kv_spec import KVCacheSpec
from ...common.request import RequestSpec
from ...kvcache.blocks import BlockPool
from ...wire.fields import MAX_TEXT, Message
from ...wire.handoff import CancelKV, KVDone
from ...wire.results import HandoffDone, HandoffFailed
from .reservation import Reservation, ReservationState
from .reservations import Reservations


@dataclass(slots=True)
class Counters:
    """Counts since the worker's start."""

    stale_messages: int = 0
    num_failures: int = 0  # opens that were doomed by something else than an abort
    checksum_failures: int = 0
    grant_rejects: Counter[str] = field(default_factory=Counter)
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0


class Endings:
    """Moves reservations to DOOMED and RELEASED. The only one that takes blocks into quarantine and out of it."""

    def __init__(
        self,
        *,
        reservations: Reservations,
        pool: BlockPool,
        spec: KVCacheSpec,
        clock: Clock,
        counters: Counters,
        to_router: Callable[[str, Message], None],
        to_peer: Callable[[str, Message], None],
    ) -> None:
        self._reservations = reservations
        self._pool = pool
        self._spec = spec
        self._clock = clock
        self._counters = counters
        self._to_router = to_router
        self._to_peer = to_peer

    def drop(self, reservation: Reservation, reason: str) -> None:
        """Give up for a reason that its router knows."""
        if reservation.state is ReservationState.OPEN:
            self.doom(reservation, reason, None)
        elif reservation.state is ReservationState.ARRIVED:
            self.release(reservation)
        else:
            self.forget(reservation, arrived=False)
            self._free(reservation)
            reservation.advance(ReservationState.RELEASED, self._clock.now())

    def give_up(self, reservation: Reservation, reason: str, blame: str) -> None:
        """GRANTED: nobody will open it. Its router hears so."""
        self.drop(reservation, reason)
        self.tell_failed(reservation.router_id, reservation.spec, reason, blame, None)

    def release(self, reservation: Reservation) -> None:
        """ARRIVED: the blocks go back. ADOPTED: the sequence has given them back itself."""
        if reservation.state is ReservationState.ARRIVED:
            self.forget(reservation, arrived=True)
            self._free(reservation)
        reservation.advance(ReservationState.RELEASED, self._clock.now())

    def doom(self, reservation: Reservation, reason: str, blame: str | None) -> None:
        """Stop waiting for an open. Only the blocks that the writer was told of go into quarantine."""
        writer = reservation.writer
        assert writer is not None
        reservation.advance(ReservationState.DOOMED, self._clock.now())
        self._reservations.end_attempt(reservation, arrived=False)
        self._pool.free(reservation.hit_blocks)
        self._pool.free(reservation.copy_blocks)
        self._pool.quarantine(reservation.block_ids)
        reservation.hit_blocks, reservation.copy_blocks = [], []
        self._to_peer(writer.session, CancelKV(grant_id=reservation.grant.grant_id, open_id=writer.open_id))
        if blame is not None:
            self._counters.num_failures += 1
            self.tell_failed(reservation.router_id, reservation.spec, reason, blame, reservation)

    def rank_ended(self, reservation: Reservation, source_rank: int) -> None:
        """A source rank of a doomed reservation writes no more: all its posts were done, or none is left.

        One KVArrived suffices, to whichever of our ranks: a source rank sends them after all its writes were done.
        """
        assert reservation.writer is not None
        reservation.writer.ended_ranks.add(source_rank)
        self.release_if_ended(reservation)

    def release_if_ended(self, reservation: Reservation) -> None:
        if reservation.writer is not None and reservation.writer.has_ended:
            self.end_doomed(reservation)

    def end_doomed(self, reservation: Reservation) -> None:
        """Nobody writes into its blocks any more."""
        self._pool.release_quarantine(reservation.block_ids)
        self.tell_needless(reservation)
        self._reservations.remove(reservation)
        reservation.advance(ReservationState.RELEASED, self._clock.now())

    def _free(self, reservation: Reservation) -> None:
        self._pool.free(reservation.hit_blocks + reservation.block_ids + reservation.copy_blocks)

    def forget(self, reservation: Reservation, *, arrived: bool) -> None:
        """Neither waited for nor written to any more."""
        self._reservations.end_attempt(reservation, arrived=arrived)
        self._reservations.remove(reservation)

    # --- who is told ------------------------------------------------------------------------------------------

    def tell_needless(self, reservation: Reservation) -> None:
        """KVDone: the writer may forget the shipment."""
        writer = reservation.writer
        if writer is not None:
            self._to_peer(writer.session, KVDone(grant_id=reservation.grant.grant_id, open_id=writer.open_id))

    def tell_arrived(self, reservation: Reservation) -> None:
        num_blocks, num_ranks = len(reservation.block_ids), len(reservation.grant.ranks)
        num_bytes = self._spec.worker_bytes(num_blocks, num_ranks, reservation.num_new_thin)
        spec = reservation.spec
        done = HandoffDone(request_id=spec.request_id, attempt=spec.attempt, num_bytes=num_bytes)
        self._to_router(reservation.router_id, done)

    def tell_failed(
        self, router_id: str, spec: RequestSpec, reason: str, blame: str, reservation: Reservation | None
    ) -> None:
        writer = reservation.writer if reservation is not None else None
        self._to_router(
            router_id,
            HandoffFailed(
                request_id=spec.request_id,
                attempt=spec.attempt,
                reason=reason[:MAX_TEXT],
                blame=blame,
                worker_id=writer.worker_id if writer is not None else "",
            ),
        )

    def tell_what_became(self, request_id: str, attempt: int, router_id: str | None) -> None:
        """Tell a router what became of a handoff that is over."""
        ended = self._reservations.ended_attempt(request_id)
        router = ended.router_id if ended is not None else router_id
        if router is None:
            self._counters.stale_messages += 1
        elif ended is not None and ended.attempt == attempt and ended.arrived:
            self._to_router(router, HandoffDone(request_id=request_id, attempt=attempt))
        else:
            blame = "unknown" if ended is None else "ended"
            failed = HandoffFailed(request_id=request_id, attempt=attempt, reason="no such handoff", blame=blame)
            self._to_router(router, failed)
