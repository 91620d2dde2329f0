"""What holds for a worker that may change its role: I12's part of the worker, I18 and I19.

SetRole         what was started before is there after it, in the same state (I19)
work comes      nothing is begun that is not the active role's (I18)
any event       a drain goes on, whatever came (I12)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvferry.wire.results import Grant
from kvferry.wire.tasks import LocalTask, PrefillTask, ReserveKV
from kvferry.worker.roles import RoleName

from .breach import Breach

if TYPE_CHECKING:
    from .workers import Worker

_ROLE_OF: dict[str, RoleName] = {"prompt": "prefill", "shipment": "prefill", "answer": "decode"}  # and reservations
Started = tuple[str, str, int]  # kind, request id or state, a number


class RoleRules:
    """One worker's."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._granted: set[int] = set()  # epochs

    def _started(self) -> set[Started]:
        """Every piece of work that the worker has begun."""
        prefill, decode = self._worker.core.prefill, self._worker.core.decode
        found: set[Started] = {("prompt", task.spec.request_id, task.spec.attempt) for task in prefill._tasks}
        found |= {("shipment", one.request_id, open_id) for open_id, one in prefill._shipments._opens.items()}
        for request_id, request in decode._requests._running.items():
            found |= {("answer", request_id, choice) for choice in request.sequences}
        for epoch, reservation in decode.receiver.reservations.live.items():
            is_awaited = decode.receiver.holds(reservation.spec.request_id)
            found.add((f"{reservation.state.value} reservation", "awaited" if is_awaited else "", epoch))
        return found

    @contextmanager
    def keeps_what_was_started(self) -> Iterator[None]:
        """I19, around a change of the role."""
        before = self._started()
        yield
        lost = before - self._started()
        if lost:
            raise Breach("I19", f"{self._worker.place} lost {sorted(lost)}")
        seen = self._worker.world.tally.seen
        for kind in {kind for kind, _, _ in before} or {"nothing"}:
            seen[f"role change with {kind}"] += 1
        seen["role change in a drain"] += self._worker.core.is_draining

    @contextmanager
    def takes_its_own_work(self, message: PrefillTask | ReserveKV | LocalTask) -> Iterator[None]:
        """I18, around a router's message."""
        before, active_role = self._started(), self._worker.core.roles.active_role
        yield
        others = {kind for kind, _, _ in self._started() - before if _ROLE_OF.get(kind, "decode") != active_role}
        if others:
            text = f"{self._worker.place}, whose role is {active_role}, begins a {sorted(others)[0]}"
            raise Breach("I18", f"{text} of {message.spec.request_id}")

    def check_grant(self, message: Grant) -> None:
        """I18, where a reservation has waited for room: a grant may be repeated in any role, not given."""
        epoch, active_role = message.grant.grant_id.epoch, self._worker.core.roles.active_role
        if epoch not in self._granted and active_role != "decode":
            text = f"{self._worker.place}, whose role is {active_role}, grants blocks"
            raise Breach("I18", f"{text} to {message.request_id}")
        self._granted.add(epoch)

    def check_drain(self) -> None:
        """I12: whoever was told to end takes nothing new until then."""
        if self._worker.core.is_draining and not self._worker.core.roles.draining:
            raise Breach("I12", f"{self._worker.place} was told to drain and takes new work")
