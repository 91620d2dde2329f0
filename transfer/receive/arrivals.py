"""Arrivals: a handoff is over when every source rank has told every decode rank that it wrote to.

Adoption waits for the full set of (source rank, decode rank) pairs. Where checksums were promised, each pair's blocks
must be those of the grant and were looked at by the rank that they came to, before this is called.
"""

from __future__ import annotations

from ...common.clock import Clock
from ...wire.handoff import KVArrived
from ..protocol.handoff import Verdict
from .endings import Counters, Endings
from .reservation import Reservation, ReservationState, Writer
from .reservations import Reservations


class Arrivals:
    """Moves reservations to ARRIVED, or dooms them."""

    def __init__(
        self, *, reservations: Reservations, endings: Endings, clock: Clock, counters: Counters, checks_bytes: bool
    ) -> None:
        self._reservations = reservations
        self._endings = endings
        self._clock = clock
        self._counters = counters
        self._checks_bytes = checks_bytes

    def on_arrived(self, reservation: Reservation, decode_rank: int, message: KVArrived, verdict: Verdict) -> None:
        """Take one source rank's word to one decode rank. It comes from the writer of the reservation."""
        writer = reservation.writer
        assert writer is not None
        pair = (message.source_rank, decode_rank)
        if pair not in writer.expected:
            self._counters.stale_messages += 1
        elif reservation.state is ReservationState.OPEN:
            writer.ended_ranks.add(message.source_rank)
            fault = self._fault(reservation, writer, message, verdict)
            if fault is None:
                self._on_pair(reservation, writer, pair, message)
            else:
                self._endings.doom(reservation, *fault)
                self._endings.release_if_ended(reservation)
        elif reservation.state is ReservationState.DOOMED:
            self._endings.rank_ended(reservation, message.source_rank)
        else:
            self._endings.tell_needless(reservation)

    def _fault(
        self, reservation: Reservation, writer: Writer, message: KVArrived, verdict: Verdict
    ) -> tuple[str, str] | None:
        """Say why what has arrived is not what was granted, and whom to blame."""
        first_choices = {choice.choice for choice in message.first_tokens}
        if message.num_tokens != reservation.num_tokens or not first_choices <= set(reservation.spec.choices):
            found = f"{message.num_tokens} tokens of choices {sorted(first_choices)}"
            return f"{found} arrived, want {reservation.num_tokens}", "peer"
        if message.draft:
            found = f"{len(message.draft)} bytes of a draft's state came from rank {message.source_rank}"
            return f"{found} of {writer.worker_id}, and no draft runs here", "peer"
        if not self._checks_bytes or not writer.has_checksums:
            return None
        if verdict is Verdict.INTACT and message.block_ids == reservation.grant.block_ids:
            return None
        self._counters.checksum_failures += 1
        return f"what rank {message.source_rank} of {writer.worker_id} wrote has another checksum here", "checksum"

    def _on_pair(self, reservation: Reservation, writer: Writer, pair: tuple[int, int], message: KVArrived) -> None:
        writer.arrived.add(pair)
        if message.source_rank == 0:
            reservation.first_tokens = message.first_tokens
            reservation.num_cached_by_writer = message.num_cached_tokens
        if writer.arrived == writer.expected:
            reservation.advance(ReservationState.ARRIVED, self._clock.now())
            self._reservations.arrived.append(reservation)
            self._endings.tell_arrived(reservation)
            self._endings.tell_needless(reservation)
