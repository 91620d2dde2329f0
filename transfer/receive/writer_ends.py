"""A writer ends before all has arrived: it says so, its connection or its process ends, or its time is over.

KVClosed of a source rank         doomed; clean: that rank writes no more
connection lost, process dead     doomed: its word may be lost, what it wrote may not
lease over                        doomed: a lease that runs out never frees
grant that nobody opened, or      free at once: nobody may write
whose open is held and closed
"""

from __future__ import annotations

from collections.abc import Callable

from ...common.clock import Clock
from ...common.config import TransferConfig
from ...wire.fields import Message
from ...wire.handoff import KVClosed, KVDone
from .endings import Counters, Endings
from .opens import Opens
from .reservation import Reservation, ReservationState, Writer
from .reservations import Reservations

WRITABLE = (ReservationState.OPEN, ReservationState.DOOMED)  # somebody may write, or report an end


class WriterEnds:
    """`WriterEnds` notices that a writer has ended, or that there will be none."""

    def __init__(
        self,
        *,
        reservations: Reservations,
        endings: Endings,
        opens: Opens,
        clock: Clock,
        counters: Counters,
        config: TransferConfig,
        to_peer: Callable[[str, Message], None],
    ) -> None:
        self._reservations = reservations
        self._endings = endings
        self._opens = opens
        self._clock = clock
        self._counters = counters
        self._config = config
        self._to_peer = to_peer

    def on_closed(self, session: str, message: KVClosed) -> None:
        """Take a source rank's word that it gives up, or that nothing of its can land any more."""
        reservation = self._reservations.of_open(message.grant_id, message.open_id)
        writer = reservation.writer if reservation is not None else None
        if reservation is None or writer is None:
            self._counters.stale_messages += 1
        if reservation is None or writer is None or reservation.state not in WRITABLE:
            # It is told until somebody answers. Its KVOpen may be held, or come late.
            self._reservations.remember_open(message.open_id, session)
            self._to_peer(session, KVDone(grant_id=message.grant_id, open_id=message.open_id))
            self._opens.end_held(message.grant_id, message.open_id)
            return
        if message.source_rank >= writer.tp_size:
            self._counters.stale_messages += 1
            return
        if reservation.state is ReservationState.OPEN:
            reason = message.reason or "the prefill worker closed the handoff"
            self._endings.doom(reservation, reason, "ended" if message.clean else "link")
        if reservation.state is ReservationState.DOOMED:
            self._note_end(reservation, writer, session, message)

    def _note_end(self, reservation: Reservation, writer: Writer, session: str, message: KVClosed) -> None:
        writer.session = session  # an end may be told over a newer connection: answer there
        if message.detached:
            writer.detached_ranks.add(message.source_rank)
        if message.clean:
            self._endings.rank_ended(reservation, message.source_rank)

    def on_session_lost(self, session: str) -> None:
        """Doom what was opened over a connection that has ended."""
        self._opens.drop_held(session)
        for reservation in self._reservations.in_state(ReservationState.OPEN):
            if reservation.writer and reservation.writer.session == session:
                self._endings.doom(reservation, f"connection to {reservation.writer.worker_id} lost", "peer")

    def check(self) -> None:
        """Look for writers that are dead, and for what is due."""
        now = self._clock.now()
        for reservation in self._reservations.in_state(ReservationState.GRANTED, ReservationState.OPEN):
            writer = reservation.writer
            if writer is not None and writer.is_dead:
                self._endings.doom(reservation, f"{writer.worker_id} has ended", "peer")
            elif now < reservation.deadline:
                continue
            elif reservation.state is ReservationState.GRANTED:
                reason = f"no prefill worker opened the grant within {self._config.open_within_s} s"
                self._endings.give_up(reservation, reason, "expired")
            else:
                self._endings.doom(reservation, f"no renewal within {self._config.lease_s} s", "expired")
