"""A decode worker's books of its reservations: by epoch, by request, and what is remembered of those that ended.

    add ─> live and found by its request ─> end_attempt: not waited for any more ─> remove: nobody writes any more

A doomed reservation has ended for its request and is live until its writer has ended; an adopted one leaves both
books at once. Late messages are answered from what is remembered, a bounded number of attempts and opens.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple, TypeVar

from ...common.request import BlockId
from ...kvcache.blocks import BlockPool
from ...wire.grants import GrantId
from .reservation import Reservation, ReservationState

MAX_PROMISED_SHARE = 0.5  # of the pool, for blocks that are granted, open or in quarantine
_MAX_REMEMBERED = 8192


class Kept(NamedTuple):
    """Blocks that are kept for those whose turn is before."""

    num_free: int = 0  # of those that are free
    num_promised: int = 0  # of those that may be promised at a time


NOTHING_KEPT = Kept()


class EndedAttempt(NamedTuple):
    """The last attempt of a request that ended here."""

    attempt: int
    arrived: bool
    router_id: str


class Reservations:
    """Knows what is promised, waits and lies in quarantine. Owns no block and decides nothing but `shortage`."""

    def __init__(self, pool: BlockPool, worker_id: str, incarnation: int) -> None:
        self._pool = pool
        self._worker = (worker_id, incarnation)
        self.live: dict[int, Reservation] = {}  # by epoch: GRANTED, OPEN, ARRIVED and DOOMED
        self.arrived: list[Reservation] = []  # in the order of arrival
        self._by_request: dict[str, Reservation] = {}  # by request id: GRANTED, OPEN and ARRIVED
        self._ended_attempts: OrderedDict[str, EndedAttempt] = OrderedDict()  # by request id
        self._ended_opens: OrderedDict[int, str] = OrderedDict()  # open id -> session

    def add(self, reservation: Reservation) -> None:
        self.live[reservation.grant.grant_id.epoch] = reservation
        self._by_request[reservation.spec.request_id] = reservation

    def end_attempt(self, reservation: Reservation, *, arrived: bool) -> None:
        """The request no longer waits for it."""
        spec = reservation.spec
        del self._by_request[spec.request_id]
        if reservation in self.arrived:
            self.arrived.remove(reservation)
        ended = EndedAttempt(spec.attempt, arrived, reservation.router_id)
        _remember(self._ended_attempts, spec.request_id, ended)

    def remove(self, reservation: Reservation) -> None:
        """Nothing of it is left that a writer could touch."""
        del self.live[reservation.grant.grant_id.epoch]
        if reservation.writer is not None:
            self.remember_open(reservation.writer.open_id, reservation.writer.session)

    def remember_open(self, open_id: int, session: str) -> None:
        """Remember an open that is over, or never was."""
        _remember(self._ended_opens, open_id, session)

    # --- looking up ---------------------------------------------------------------------------------------

    def find(self, grant_id: GrantId) -> Reservation | None:
        """Find the reservation of a grant of ours that has not ended."""
        return self.live.get(grant_id.epoch) if (grant_id.worker_id, grant_id.incarnation) == self._worker else None

    def of_open(self, grant_id: GrantId, open_id: int) -> Reservation | None:
        """Find the reservation whose writer made this open."""
        reservation = self.find(grant_id)
        writer = reservation.writer if reservation is not None else None
        return reservation if writer is not None and writer.open_id == open_id else None

    def of_request(self, request_id: str) -> Reservation | None:
        """The reservation of the request that may still be adopted."""
        return self._by_request.get(request_id)

    def of_router(self, router_id: str) -> list[Reservation]:
        return [reservation for reservation in self._by_request.values() if reservation.router_id == router_id]

    def in_state(self, *states: ReservationState) -> list[Reservation]:
        return [reservation for reservation in self.live.values() if reservation.state in states]

    def ended_attempt(self, request_id: str) -> EndedAttempt | None:
        return self._ended_attempts.get(request_id)

    def session_of_ended(self, open_id: int) -> str | None:
        """Return the session on which the writer of an open that is over was last heard."""
        return self._ended_opens.get(open_id)

    def is_stale(self, request_id: str, attempt: int) -> bool:
        """The request is past that attempt, or in it."""
        ended, known = self._ended_attempts.get(request_id), self._by_request.get(request_id)
        return (ended is not None and attempt <= ended.attempt) or (known is not None and attempt <= known.spec.attempt)

    def quarantine_s(self, now: float, incarnation: int | None = None) -> float:
        """Age of the oldest quarantine (of one prefill worker's incarnation); 0 where there is none."""
        since = [
            reservation.since
            for reservation in self.in_state(ReservationState.DOOMED)
            if reservation.writer and incarnation in (None, reservation.writer.incarnation)
        ]
        return now - min(since) if since else 0.0

    @property
    def promises(self) -> frozenset[int]:
        """The epochs of those that may yet be filled."""
        return frozenset(epoch for epoch, reservation in self.live.items() if reservation.is_promise)

    # --- counting -----------------------------------------------------------------------------------------

    @property
    def num_granted_blocks(self) -> int:
        """Blocks of promises that may still be filled."""
        return sum(self._num_frames(reservation) for reservation in self.live.values() if reservation.is_promise)

    def has_turn(self, num_blocks: int, epochs: frozenset[int]) -> bool:
        """Tell whether so many blocks may be promised beside those of these promises that still are."""
        older = [found for epoch in epochs if (found := self.live.get(epoch)) is not None and found.is_promise]
        return not older or num_blocks + sum(map(self._num_frames, older)) <= MAX_PROMISED_SHARE * self._pool.num_blocks

    def _num_frames(self, reservation: Reservation) -> int:
        """Count the whole blocks whose memory was taken for a reservation alone."""
        return self._pool.num_frames(reservation.num_new_blocks, reservation.num_new_thin)

    @property
    def num_quarantined_blocks(self) -> int:
        """Count the blocks of doomed reservations; nothing else is in quarantine (`check`)."""
        doomed = self.in_state(ReservationState.DOOMED) if self._pool.num_quarantined_blocks else ()
        return sum(self._pool.num_frames(len(found.block_ids), found.num_new_thin) for found in doomed)

    def shortage(
        self,
        num_total: int,
        hits: list[BlockId],
        growth_reserve: int,
        kept: Kept = NOTHING_KEPT,
        *,
        num_thin: int = 0,
        without_quarantine: bool = False,
    ) -> str | None:
        """Say why `num_total` blocks, of which `hits` are here, cannot be promised now; None if they can.

        `growth_reserve`: blocks that running sequences need. `kept`: those for whose turn is before.

        `num_thin`: of those that are not here.

        `without_quarantine`: as if what lies in quarantine were free.
        """
        num_new = self._pool.num_needed(num_total - len(hits), num_thin, hits)
        num_quarantined = self.num_quarantined_blocks
        num_free = self._pool.num_free_blocks - self._pool.num_evictable(hits)
        if without_quarantine:
            num_free, num_quarantined = num_free + num_quarantined, 0
        if num_total > self._pool.num_blocks:
            return "never_fits"
        if num_new > num_free:
            return "blocks"
        if num_new + growth_reserve + kept.num_free > num_free:
            return "growth"
        promised = self.num_granted_blocks + num_quarantined + kept.num_promised
        promised += self._pool.num_frames(num_total - len(hits), num_thin)
        if promised > MAX_PROMISED_SHARE * self._pool.num_blocks:
            # One promise may be larger than the share: else a long prompt could never pass.
            has_others = kept.num_promised > 0 or bool(self.promises)
            return "growth" if has_others else None
        return None

    def check(self) -> None:
        """Assert that these books and the pool's agree."""
        self._pool.check()
        doomed = self.in_state(ReservationState.DOOMED)
        assert sum(len(reservation.block_ids) for reservation in doomed) == self._pool.num_quarantined_blocks
        named = [block for reservation in self.live.values() for block in reservation.block_ids]
        assert len(named) == len(set(named)), "a block is granted twice"
        for reservation in self.live.values():
            assert reservation.state not in (ReservationState.ADOPTED, ReservationState.RELEASED)
            if reservation.state is not ReservationState.DOOMED:
                assert all(self._pool.ref_count(block) == 1 for block in reservation.block_ids)
                assert all(self._pool.ref_count(block) >= 1 for block in reservation.hit_blocks)


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def _remember(book: OrderedDict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Write into a book that forgets its oldest entries."""
    book.pop(key, None)
    book[key] = value
    if len(book) > _MAX_REMEMBERED:
        book.popitem(last=False)
