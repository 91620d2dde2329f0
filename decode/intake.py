"""Routers tell a decode worker which requests to begin, to keep and to end; an intake does as they say.

    ReserveKV ─> room is promised            LocalTask ─> its prompt is computed here
    Abort ─> a request ends, or some of its choices      LiveRequests ─> all others end

A request that is older than what is known of it is passed over; one that cannot be served here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..common.errors import CapacityError
from ..common.request import RequestSpec
from ..common.served import Served, is_expired
from ..transfer.receive.receiver import KVReceiver
from ..wire.fields import Message
from ..wire.results import HandoffDone, NoCapacity, TaskRefused
from ..wire.tasks import Abort, LocalTask, PrefillTask, ReserveKV
from ..wire.workers import LiveRequests
from .local import LocalRequests
from .promises import Promises
from .requests import RunningRequests
from .running import RunningRequest


@dataclass(slots=True, frozen=True)
class Intake:
    """An `Intake` takes routers' messages. Called with the lock held."""

    requests: RunningRequests
    promises: Promises
    local: LocalRequests
    receiver: KVReceiver
    to_router: Callable[[str, Message], None]
    served: Served

    def take(self, router_id: str, message: Message) -> None:
        match message:
            case ReserveKV():
                self._on_reserve(router_id, message)
            case LocalTask():
                self._on_local(router_id, message)
            case Abort():
                self._on_abort(router_id, message)
            case LiveRequests():
                self.keep_only(router_id, frozenset(message.attempts))
            case PrefillTask(spec=spec):
                self.refuse(router_id, spec, "wrong_role", "this worker decodes")
            case _:
                raise AssertionError(f"unexpected {type(message).__name__}")

    def _on_reserve(self, router_id: str, message: ReserveKV) -> None:
        spec = message.spec
        if not self.requests.drop_older(spec):
            return
        if (refusal := self._refusal(spec)) is not None:
            reason, detail = refusal
            no = NoCapacity(request_id=spec.request_id, attempt=spec.attempt, reason=reason, detail=detail)
            self.to_router(router_id, no)
            return
        self.served.grammar(spec, is_awaited=False)  # compiled while the prompt is
        self.served.adapter(spec)  # and loaded
        self.promises.reserve(router_id, message)

    def _refusal(self, spec: RequestSpec) -> tuple[str, str] | None:
        """Say why an attempt is not begun, whatever room there is, and what more there is to say; None: it may be."""
        if self.requests.has_ended(spec):
            return "stale", ""
        if self.promises.has_newer(spec):
            self.requests.stale_messages += 1
            return "stale", ""
        if is_expired(spec):
            return "expired", ""
        return self.served.why_not(spec)

    def _on_local(self, router_id: str, message: LocalTask) -> None:
        spec = message.spec
        if not self.requests.drop_older(spec):
            return
        self.promises.drop(spec.request_id, spec.attempt)
        refusal = self._refusal(spec)
        if refusal is None and (self.receiver.draining or not self.receiver.is_active):
            refusal = ("draining" if self.receiver.draining else "wrong_role"), ""
        if refusal is not None:
            self.refuse(router_id, spec, *refusal)
            return
        try:
            self.local.begin(router_id, message)
        except CapacityError as error:
            self.refuse(router_id, spec, "never_fits", str(error))

    def refuse(self, router_id: str, spec: RequestSpec, reason: str, detail: str = "") -> None:
        """Tell a router that a request is not served here, and why."""
        self.to_router(
            router_id, TaskRefused(request_id=spec.request_id, attempt=spec.attempt, reason=reason, detail=detail)
        )

    def _on_abort(self, router_id: str, message: Abort) -> None:
        request_id, attempt = message.request_id, message.attempt
        request = self.requests.get(request_id)
        if message.unless_arrived:
            if request is not None and request.spec.attempt == attempt:
                self.to_router(router_id, HandoffDone(request_id=request_id, attempt=attempt))
            else:
                self.promises.abort_unless_arrived(router_id, request_id, attempt)
        elif request is not None and request.spec.attempt <= attempt:
            self._abort_running(request, message.choices)
        elif not message.choices:
            self.promises.drop(request_id, attempt)
            self.requests.note_ended(request_id, attempt)
        else:
            self.promises.drop_choices(request_id, attempt, message.choices)

    def _abort_running(self, request: RunningRequest, choices: tuple[int, ...]) -> None:
        if not choices:
            self.requests.end(request)
        for choice in choices:
            if not request.is_finished:
                self.requests.drop_choice(request, choice)

    def keep_only(self, router_id: str, keep: frozenset[tuple[str, int]]) -> None:
        """End whatever else this router has here."""
        self.requests.keep_only(router_id, keep)
        self.promises.keep_only(router_id, keep)
