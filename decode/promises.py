"""`Promises` keeps what a decode worker was asked to hold room for, until its prompt is adopted or not waited for.

    reserve ─> waits for blocks ─> Grant ─> ... the prefill worker writes ... ─> adopted
                   └──────────────────┴─> drop, abort_unless_arrived, keep_only, give_up_unopened

Running requests are `requests.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..common import failpoints
from ..common.request import BlockId, RequestSpec
from ..transfer.receive.receiver import KVReceiver
from ..transfer.receive.reservation import ReservationState
from ..wire.fields import Message
from ..wire.results import Grant, HandoffFailed, NoCapacity
from ..wire.tasks import ReserveKV
from .adoption import Adoption
from .waiting import WaitingReservations


class Promises:
    """Keeps reservations in step, those that wait and those that were granted, with what is to be adopted of them."""

    def __init__(
        self,
        receiver: KVReceiver,
        waiting: WaitingReservations,
        adoption: Adoption,
        to_router: Callable[[str, Message], None],
    ) -> None:
        self._receiver = receiver
        self._waiting = waiting
        self._adoption = adoption
        self._to_router = to_router

    def reserve(self, router_id: str, message: ReserveKV) -> None:
        """Grant blocks, now or when there are some, or say that there are none."""
        self._answer(self._waiting.reserve(router_id, message))

    def retry(self) -> None:
        """Blocks may have come free, or what is promised may have changed."""
        self._answer(self._waiting.retry())

    def _answer(self, answers: list[tuple[str, Grant | NoCapacity]]) -> None:
        for router_id, answer in answers:
            if failpoints.armed:
                failpoints.hit("grant.issued")
            self._to_router(router_id, answer)

    def drop(self, request_id: str, attempt: int) -> None:
        """Nobody waits for this attempt, or one before it, to arrive."""
        self._receiver.abort(request_id, attempt)
        self._waiting.drop(request_id, attempt)

    def abort_unless_arrived(self, router_id: str, request_id: str, attempt: int) -> None:
        """Give it up where its prompt has not come. The router is told which it was."""
        self._waiting.drop(request_id, attempt)
        self._receiver.abort(request_id, attempt, unless_arrived=True, router_id=router_id)

    def drop_choices(self, request_id: str, attempt: int, choices: tuple[int, ...]) -> None:
        """Leave these choices out when the prompt arrives, if it may yet come."""
        if self._awaits(request_id):
            self._adoption.drop_choices(request_id, attempt, choices)

    def keep_only(self, router_id: str, keep: frozenset[tuple[str, int]]) -> None:
        """Give up the router's but those of the (request id, attempt) pairs in `keep`."""
        self._receiver.keep_only(router_id, keep)
        self._waiting.keep_only(router_id, keep)

    def give_up_unopened(self) -> None:
        """Nobody may open them any more: their routers learn it now."""
        for reservation in self._receiver.reservations.in_state(ReservationState.GRANTED):
            request_id, attempt = reservation.spec.request_id, reservation.spec.attempt
            self._receiver.abort(request_id, attempt)
            reason = "the decode worker drains"
            failed = HandoffFailed(request_id=request_id, attempt=attempt, reason=reason, blame="draining")
            self._to_router(reservation.router_id, failed)

    def tick(self) -> None:
        self._receiver.tick()
        self.retry()
        self._adoption.forget_all_but(self._awaits)

    def has_newer(self, spec: RequestSpec) -> bool:
        """Tell whether room is promised to a later attempt at the request, or it waits for some."""
        found = self._receiver.reservations.of_request(spec.request_id)
        known = [*self._waiting.specs, *([found.spec] if found is not None else [])]
        return any(one.request_id == spec.request_id and one.attempt > spec.attempt for one in known)

    def _awaits(self, request_id: str) -> bool:
        """The request's KV may yet come."""
        return self._receiver.holds(request_id) or self._waiting.holds(request_id)

    # --- what others see ----------------------------------------------------------------------------------

    def specs(self) -> Iterator[RequestSpec]:
        """Yield what room was promised for, and then what waits for it."""
        yield from (reservation.spec for reservation in self._receiver.reservations.live.values())
        yield from self._waiting.specs

    @property
    def routers(self) -> set[str]:
        """Return the routers that are promised room for a request, or wait for it."""
        promised = {reservation.router_id for reservation in self._receiver.reservations.live.values()}
        return self._waiting.routers | promised

    @property
    def num_waiting(self) -> int:
        """Count the requests that wait for blocks to be promised to them."""
        return len(self._waiting)

    @property
    def num_unfinished(self) -> int:
        """Count the handoffs under way. What lies in quarantine is none: our end fences it."""
        states = (ReservationState.GRANTED, ReservationState.OPEN, ReservationState.ARRIVED)
        return len(self._waiting) + len(self._receiver.reservations.in_state(*states))

    @property
    def is_empty(self) -> bool:
        """Nothing is promised, waits or is remembered, and nothing is in quarantine."""
        return not (len(self._waiting) or len(self._adoption) or len(self._receiver.reservations.live))

    def references(self) -> list[list[BlockId]]:
        """All references to blocks of the pool that reservations hold."""
        held = []
        for reservation in self._receiver.reservations.live.values():
            if reservation.state is not ReservationState.DOOMED:  # its blocks are nobody's
                held += [reservation.hit_blocks, reservation.block_ids, reservation.copy_blocks]
        return held
