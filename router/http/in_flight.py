"""The answers that clients wait for here: counted while a server drains, and ended where it may not wait for them."""

from __future__ import annotations

from starlette.responses import Response

from ..state.errors import StreamError
from .sending import Sending


def shutting_down() -> StreamError:
    return StreamError("the server is shutting down", "shutting_down", 503)


class UnderWay(Response):
    """An answer that is counted, and may be ended from outside. Starlette calls it as an ASGI application."""

    def __init__(self, in_flight: InFlight, *, is_background: bool = False) -> None:
        """`is_background`: no client waits for it."""
        self.background = None
        self.status_code = 200
        self.is_background = is_background
        self._in_flight = in_flight
        self._sending = Sending()
        in_flight.add(self)

    def end(self, error: Exception) -> None:
        """End it from outside."""
        self._sending.end(error)


class InFlight:
    """The answers under way. When the server ends, new ones are refused and the last ones told."""

    def __init__(self) -> None:
        self._answers: set[UnderWay] = set()
        self.is_leaving = False  # /ready says no; connections that are open may still ask
        self.is_closing = False

    def __len__(self) -> int:
        """Return how many clients wait for one: nobody waits for a batch's lines."""
        return sum(not answer.is_background for answer in self._answers)

    def check_open(self) -> None:
        if self.is_closing:
            raise shutting_down()

    def add(self, answer: UnderWay) -> None:
        self._answers.add(answer)

    def discard(self, answer: UnderWay) -> None:
        self._answers.discard(answer)

    def end_all(self) -> None:
        """Each answer ends now, with an error that its client sees."""
        self.is_closing = True
        for answer in list(self._answers):
            answer.end(shutting_down())
