"""Earlier turns of /v1/responses, for as long as this router keeps them: `previous_response_id` goes on with one.

Items of answers are found by their ids, as clients that keep none of their own refer to them, and responses whole.

Memory and time have bounds: the oldest leave first. Another router does not know them, and a restart forgets them.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from ...common.clock import Clock
from ...common.errors import RequestError
from ..state.errors import clip, shown
from ..turns.places import Message
from .tools import Names

RESPONSE_PREFIX = "resp_"
MAX_BYTES = 64 * 2**20  # of all conversations together; more keeps them longer under load
MAX_BYTES_OF_ONE = 4 * 2**20
MAX_AGE_S = 3600.0
_OBJECT_BYTES = 256  # of a message or a part of a call in memory, beside its text: a dict and what is in it


Item = Mapping[str, object]
_ITEM_ID = re.compile(r"[a-z]+_([0-9a-zA-Z-]+)_\d+")


def item_id(kind: str, response_id: str, index: int) -> str:
    """Return the id of an answer's item, which tells the answer's."""
    return f"{kind}_{response_id.removeprefix(RESPONSE_PREFIX)}_{index}"


@dataclass(slots=True, frozen=True)
class _Conversation:
    tenant: bytes
    messages: tuple[Message, ...]
    items: tuple[Item, ...]
    response: bytes
    names: Names
    num_bytes: int
    kept_s: float


class KeptResponses:
    """Conversations by the id of their last response. A key finds its own only."""

    def __init__(self, clock: Clock, max_bytes: int = MAX_BYTES) -> None:
        self._clock = clock
        self._max_bytes = max_bytes
        self._by_id: OrderedDict[str, _Conversation] = OrderedDict()
        self.num_bytes = 0

    def keep(
        self,
        response_id: str,
        tenant: bytes,
        messages: Sequence[Message],
        items: Sequence[Item] = (),
        response: bytes = b"{}",
        names: Names | None = None,
    ) -> None:
        """Keep a conversation and its last answer, its items and the whole of it as JSON, unless it is very long.

        `names` are those of namespaces' functions that it may have called.
        """
        names = names or {}
        num_bytes = _num_bytes(messages) + len(msgspec.json.encode(items)) + 2 * _OBJECT_BYTES * len(items)
        num_bytes += len(response) + len(msgspec.json.encode(names)) + _OBJECT_BYTES * len(names)
        if num_bytes > min(MAX_BYTES_OF_ONE, self._max_bytes):
            return
        kept_s = self._clock.now()
        self._by_id[response_id] = _Conversation(
            tenant, tuple(messages), tuple(items), response, names, num_bytes, kept_s
        )
        self.num_bytes += num_bytes
        self._forget_old()

    def find(self, response_id: object, tenant: bytes) -> Sequence[Message]:
        """Return the messages so far. Raises RequestError (404; 400 for no id). May be called from any thread."""
        name = "previous_response_id"
        if not isinstance(response_id, str):
            raise RequestError(f"{name} must be a string, got {shown(response_id)}", param=name)
        found = self._find(response_id, tenant)
        if found is None:
            raise RequestError(
                f"{name}: the response {clip(response_id)} is not kept here (any more); send its items as input",
                param=name,
                code="previous_response_not_found",
                status=404,
            )
        return found.messages

    def find_item(self, item_id: object, tenant: bytes) -> Item | None:
        """Return an answer's item; None: it is not kept. May be called from any thread."""
        named = _ITEM_ID.fullmatch(item_id) if isinstance(item_id, str) else None
        found = None if named is None else self._find(f"{RESPONSE_PREFIX}{named[1]}", tenant)
        return None if found is None else next((each for each in found.items if each["id"] == item_id), None)

    def response(self, response_id: str, tenant: bytes) -> bytes:
        """Return a response as it was answered. Raises RequestError (404)."""
        return self._named(response_id, tenant).response

    def input(self, response_id: str, tenant: bytes) -> Sequence[Message]:
        """Return the messages that a response answers. Raises RequestError (404)."""
        return self._named(response_id, tenant).messages[:-1]

    def names(self, response_id: object, tenant: bytes) -> Names:
        """Return the names of namespaces' functions in it; none if it is not kept. May be called from any thread."""
        found = self._find(response_id, tenant)
        return {} if found is None else found.names

    def forget(self, response_id: str, tenant: bytes) -> None:
        """Raises RequestError (404)."""
        self.num_bytes -= self._named(response_id, tenant).num_bytes
        del self._by_id[response_id]

    def _named(self, response_id: str, tenant: bytes) -> _Conversation:
        found = self._find(response_id, tenant)
        if found is None:
            text = f"the response {clip(response_id)} is not kept here (any more)"
            raise RequestError(text, param="response_id", code="response_not_found", status=404)
        return found

    def _find(self, response_id: object, tenant: bytes) -> _Conversation | None:
        found = self._by_id.get(response_id) if isinstance(response_id, str) else None
        return None if found is None or found.tenant != tenant or found.kept_s < self._oldest_s() else found

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
