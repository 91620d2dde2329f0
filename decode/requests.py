"""The requests that a decode worker runs: their sequences, who waits for them, and how each of them ends.

add ─> live: one sequence per unfinished choice ─> the last choice has ended, or `end` ─> remembered as ended
"""

from __future__ import annotations

from collections.abc import Iterator

from ..common.request import RequestSpec, Sequence
from ..common.served import failed_part
from .outbox import Outbox
from .running import EndedAttempts, RunningRequest
from .scheduler import DecodeScheduler


class RunningRequests:
    """Keeps requests, scheduler and outbox in step: what ends leaves all three."""

    def __init__(self, scheduler: DecodeScheduler, outbox: Outbox) -> None:
        self._scheduler = scheduler
        self._outbox = outbox
        self._running: dict[str, RunningRequest] = {}  # by request id
        self._ended = EndedAttempts()
        self._unready: list[RunningRequest] = []  # something of them was not ready when it was last looked
        self.stale_messages = 0

    def __len__(self) -> int:
        return len(self._running)

    def get(self, request_id: str) -> RunningRequest | None:
        return self._running.get(request_id)

    def request_of(self, seq: Sequence) -> RunningRequest:
        """The request that a scheduled sequence belongs to."""
        return self._running[seq.request_id]

    @property
    def routers(self) -> set[str]:
        return {request.router_id for request in self._running.values()}

    def add(self, request: RunningRequest) -> None:
        self._running[request.spec.request_id] = request
        if not request.is_equipped:
            self._unready.append(request)

    def failed(self) -> list[tuple[RunningRequest, tuple[str, str]]]:
        """Return the requests whose grammar cannot be compiled, or adapter be loaded, and why."""
        if not self._unready:
            return []
        alive = [request for request in self._unready if self._running.get(request.spec.request_id) is request]
        self._unready = [request for request in alive if not request.is_equipped]
        whys = [(request, failed_part(request.grammar, request.held_adapter)) for request in self._unready]
        return [(request, why) for request, why in whys if why is not None]

    def adapters(self) -> Iterator[str]:
        """Yield the adapters of all of them."""
        return (request.spec.adapter for request in self._running.values() if request.spec.adapter)

    def drop_older(self, spec: RequestSpec) -> bool:
        """A new attempt ends the one before it. False: it is not new, and is dropped itself."""
        request = self._running.get(spec.request_id)
        if request is not None and request.spec.attempt >= spec.attempt:
            self.stale_messages += 1
            return False
        if request is not None:
            self.end(request)
        return True

    def has_ended(self, spec: RequestSpec) -> bool:
        """The attempt ended here before; it is not begun a second time."""
        ended = self._ended.has(spec)
        self.stale_messages += ended
        return ended

    def note_ended(self, request_id: str, attempt: int) -> None:
        self._ended.add(request_id, attempt)

    def drop_choice(self, request: RunningRequest, choice: int) -> None:
        """One choice is not wanted any more. While the prompt is computed, all choices hang on one sequence."""
        if any(seq.pending_choices for seq in request.sequences.values()):
            request.dropped.add(choice)  # forgotten when the prompt is done
        elif choice in request.sequences:
            self._scheduler.remove(request.sequences.pop(choice))
        if request.is_finished:
            self.end(request)

    def remove(self, request: RunningRequest, seq: Sequence) -> None:
        """A choice has ended; with the last one the request has."""
        self._scheduler.remove(request.sequences.pop(seq.choice))
        if not request.sequences:
            self.finish(request)

    def end(self, request: RunningRequest) -> None:
        """Nobody waits for the rest of it."""
        for seq in request.sequences.values():
            self._scheduler.remove(seq)
        self._outbox.drop(request)
        self.finish(request)

    def finish(self, request: RunningRequest) -> None:
        """Nothing of it runs any more; its last tokens may yet have to leave."""
        del self._running[request.spec.request_id]
        self.note_ended(request.spec.request_id, request.spec.attempt)

    def keep_only(self, router_id: str, keep: frozenset[tuple[str, int]]) -> None:
        """End the router's but those of the (request id, attempt) pairs in `keep`."""
        for request in list(self._running.values()):
            if request.router_id == router_id and (request.spec.request_id, request.spec.attempt) not in keep:
                self.end(request)

    def expired(self, now_s: float) -> Iterator[RunningRequest]:
        """Yield the requests of which something waits to be begun beyond its deadline."""
        for seq in list(self._scheduler.queues.waiting):
            request = self._running.get(seq.request_id)
            if request is not None and request.expires_s is not None and now_s >= request.expires_s:
                yield request

    def check(self) -> None:
        """Assert that requests and scheduler know the same sequences."""
        assert all(request.sequences for request in self._running.values())
        known = {seq for request in self._running.values() for seq in request.sequences.values()}
        assert known == set(self._scheduler.queues.all())
