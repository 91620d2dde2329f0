"""The answers that clients wait for here: counted while a server drains, and ended where it may not wait for them."""

from __future__ import annotations

from typing import Protocol

from ..state.errors import StreamError


class UnderWay(Protocol):
    """A client waits for it."""

    @property
    def is_background(self) -> bool:
        """Nobody waits for it."""
        ...

    def end(self, error: Exception) -> None:
        """End it from outside."""
        ...


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
            raise StreamError("the server is shutting down", "shutting_down", 503)

    def add(self, answer: UnderWay) -> None:
        self._answers.add(answer)

    def discard(self, answer: UnderWay) -> None:
        self._answers.discard(answer)

    def end_all(self) -> None:
        """Each answer ends now, with an error that its client sees."""
        self.is_closing = True
        for answer in list(self._answers):
            answer.end(StreamError("the server is shutting down", "shutting_down", 503))
