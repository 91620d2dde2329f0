"""Earlier turns of /v1/responses, for as long as this router keeps them: `previous_response_id` goes on with one.

Memory and time have bounds: the oldest leave first. Another router does not know them, and a restart forgets them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from ...common.clock import Clock
from ...common.errors import RequestError
from ..state.errors import clip
from ..turns.places import Message

MAX_BYTES = 64 * 2**20  # of all conversations together; more keeps them longer under load
MAX_BYTES_OF_ONE = 4 * 2**20
MAX_AGE_S = 3600.0
_OBJECT_BYTES = 256  # of a message or a part of a call in memory, beside its text: a dict and what is in it


@dataclass(slots=True, frozen=True)
class _Conversation:
    tenant: bytes
    messages: tuple[Message, ...]
    num_bytes: int
    kept_s: float


class KeptResponses:
    """Conversations by the id of their last response. A key finds its own only."""

    def __init__(self, clock: Clock, max_bytes: int = MAX_BYTES) -> None:
        self._clock = clock
        self._max_bytes = max_bytes
        self._by_id: OrderedDict[str, _Conversation] = OrderedDict()
        self.num_bytes = 0

    def keep(self, response_id: str, tenant: bytes, messages: Sequence[Message]) -> None:
        """Keep a conversation, unless it is very long."""
        num_bytes = _num_bytes(messages)
        if num_bytes > min(MAX_BYTES_OF_ONE, self._max_bytes):
            return
        self._by_id[response_id] = _Conversation(tenant, tuple(messages), num_bytes, self._clock.now())
        self.num_bytes += num_bytes
        self._forget_old()

    def find(self, response_id: object, tenant: bytes) -> Sequence[Message]:
        """Return the messages so far. Raises RequestError (404). May be called from any thread."""
        found = self._by_id.get(response_id) if isinstance(response_id, str) else None
        if found is None or found.tenant != tenant or found.kept_s < self._oldest_s():
            seen = clip(response_id) if isinstance(response_id, str) else repr(type(response_id).__name__)
            raise RequestError(
                f"previous_response_id: the response {seen} is not kept here (any more); send its items as input",
                param="previous_response_id",
                code="previous_response_not_found",
                status=404,
            )
        return found.messages

    def _oldest_s(self) -> float:
        return self._clock.now() - MAX_AGE_S

    def _forget_old(self) -> None:
        while self._by_id:
            response_id, oldest = next(iter(self._by_id.items()))
            if self.num_bytes <= self._max_bytes and oldest.kept_s >= self._oldest_s():
                return
            del self._by_id[response_id]
            self.num_bytes -= oldest.num_bytes


def _num_bytes(messages: Sequence[Message]) -> int:
    """Return what messages take: of many short ones, ten times their text."""
    calls = [calls for message in messages if isinstance(calls := message.get("tool_calls"), list)]
    return len(msgspec.json.encode(messages)) + _OBJECT_BYTES * (len(messages) + 2 * sum(map(len, calls)))
