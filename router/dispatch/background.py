"""Background requests run while nobody else is served: lines of batches, which have a day.

    a request of somebody who waits comes  ->  background requests leave their workers, all but `beside` of them
    nobody has been served for QUIET_S     ->  they go on, from the tokens that they have

A queue by priority alone would not do: what runs already shares steps, cores and memory bandwidth with whoever comes.
Leaving costs little: what was computed of a prompt stays in a prefix cache, and tokens that were accepted are kept.
"""

from __future__ import annotations

from ..state.tracked_request import TrackedRequest
from .in_flight import InFlightRequests

# Longer leaves workers idle between the turns of a chat, shorter begins background work that is sent away at once.
QUIET_S = 1.0


class Background:
    """`Background` says which background requests may be on workers."""

    def __init__(self, in_flight: InFlightRequests, beside: int) -> None:
        self._in_flight = in_flight
        self._beside = beside
        self._tracked: dict[str, TrackedRequest] = {}  # oldest first
        self._served_s = float("-inf")  # when somebody else was here last
        self.has_way = True  # nobody else is served

    def on_added(self, tracked: TrackedRequest, now_s: float) -> None:
        """Note a request that was just queued, before it is placed."""
        if tracked.request.is_background:
            self._tracked[tracked.request.request_id] = tracked
            is_changed = not self.has_way
        else:
            is_changed = self.has_way
            self._served_s, self.has_way = now_s, False
        if is_changed and self._tracked:
            self._balance(now_s)

    def tick(self, now_s: float) -> None:
        """Look again who is here."""
        if not self._tracked:
            return
        self._forget_ended()
        if len(self._in_flight) > len(self._tracked):
            self._served_s = now_s
        self.has_way = now_s - self._served_s >= QUIET_S
        self._balance(now_s)

    def _balance(self, now_s: float) -> None:
        """Have as many at work as may be: the oldest."""
        self._forget_ended()
        room = len(self._tracked) if self.has_way else self._beside
        for position, tracked in enumerate(self._tracked.values()):
            if position < room and tracked.is_suspended:
                self._in_flight.resume(tracked)
            elif position >= room and not tracked.is_suspended:
                self._in_flight.suspend(tracked, now_s)

    def _forget_ended(self) -> None:
        for request_id in [name for name in self._tracked if name not in self._in_flight]:
            del self._tracked[request_id]
