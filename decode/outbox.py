"""New tokens on their way to the routers: one message per router and step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from ..wire.fields import Message
from ..wire.results import ChoiceTokens, RequestTokens, StepTokens
from .running import RunningRequest


class Outbox:
    """Filled while a step's result is taken in, emptied at the end of that."""

    def __init__(self, to_router: Callable[[str, Message], None]) -> None:
        self._to_router = to_router
        self._updates: dict[str, dict[RunningRequest, list[ChoiceTokens]]] = defaultdict(lambda: defaultdict(list))

    @property
    def is_empty(self) -> bool:
        return not self._updates

    def add(self, request: RunningRequest, update: ChoiceTokens) -> None:
        self._updates[request.router_id][request].append(update)

    def mention(self, request: RunningRequest) -> None:
        """Tell the router that the request runs from here on, whether there is a token of it or not."""
        _ = self._updates[request.router_id][request]

    def drop(self, request: RunningRequest) -> None:
        """Nobody waits for its tokens."""
        self._updates[request.router_id].pop(request, None)

    def flush(self) -> None:
        for router_id, requests in self._updates.items():
            updates = tuple(
                RequestTokens(request.spec.request_id, request.spec.attempt, tuple(choices), request.num_cached_tokens)
                for request, choices in requests.items()
            )
            if updates:
                self._to_router(router_id, StepTokens(updates=updates))
        self._updates.clear()
