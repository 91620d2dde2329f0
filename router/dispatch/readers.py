"""Whoever reads a request's stream may leave, or end a choice at a stop string: nobody computes on for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ...common.request import FinishReason
from ..state.request import RouterRequest
from ..state.token_stream import TokenStream
from ..state.tracked_request import TrackedRequest
from .in_flight import InFlightRequests


class Readers:
    """`Readers` open the streams of requests, and take what those who read them say."""

    def __init__(self, in_flight: InFlightRequests, *, place: Callable[[], None]) -> None:
        """`place()`: look who goes next, as there is room."""
        self._in_flight = in_flight
        self._place = place

    def open(self, request: RouterRequest) -> TokenStream:
        """Make the stream of a request that is about to be tracked."""
        name = request.request_id  # not the tracked request: it holds the stream, and should end with its last user
        return TokenStream(request, partial(self._on_left, name), partial(self._on_choice_ended, name))

    def _on_left(self, request_id: str) -> None:
        if (tracked := self._in_flight.get(request_id)) is not None:
            self._leave(tracked)

    def _leave(self, tracked: TrackedRequest) -> None:
        self._in_flight.abort(tracked)
        self._place()

    def _on_choice_ended(self, request_id: str, choice: int) -> None:
        """The API found a stop string. What the choice still yields is dropped."""
        tracked = self._in_flight.get(request_id)
        if tracked is None:
            return
        state = tracked.request.choices[choice]
        if tracked.request.is_finished or state.finish is not None:
            return
        state.end_now(FinishReason.STOP)
        tracked.ended_here.add(choice)
        if tracked.request.unfinished:
            if tracked.attempt is not None:
                tracked.attempt.drop_choice(choice)
        else:
            self._in_flight.finish(tracked)
            self._place()
