"""Conversations of /v1/responses are kept: `previous_response_id` goes on with one.

Items of answers, and of what they answer, are found by their ids, as clients that keep none of their own refer to them,
and responses whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import msgspec
import structlog

from ...common.errors import RequestError
from ..kept.asking import name_of_file
from ..state.errors import clip, shown
from ..turns.places import Message
from .conversation import Asked, Conversation, Earlier, Part
from .store import ResponseStore
from .tools import Names

RESPONSE_PREFIX = "resp_"
MAX_BYTES_OF_ONE = 4 * 2**20
_OBJECT_BYTES = 256  # of a message or a part of a call in memory, beside its text: a dict and what is in it

Item = Mapping[str, object]
_ITEM_ID = re.compile(r"[a-z]+_([0-9a-zA-Z-]+)_(in)?\d+")  # in: of an input
_items_of = msgspec.json.Decoder(list[msgspec.Raw]).decode
_NOTHING_ASKED = Asked()

log = structlog.get_logger(__name__)


def item_id(kind: str, response_id: str, index: int) -> str:
    """Return the id of an answer's item, which tells the answer's."""
    return f"{kind}_{response_id.removeprefix(RESPONSE_PREFIX)}_{index}"


class _Named(msgspec.Struct):
    id: str


_named = msgspec.json.Decoder(_Named).decode


class KeptResponses:
    """Conversations by the id of their last response. A key finds its own only."""

    def __init__(self, store: ResponseStore | None) -> None:
        """`store`: None, where nothing is kept."""
        self._store = store

    @property
    def are_kept(self) -> bool:
        return self._store is not None

    def keeper(
        self,
        response_id: str,
        tenant: bytes,
        messages: Sequence[Message],
        items: Sequence[Item] = (),
        response: bytes = b"{}",
        names: Names | None = None,
        asked: Asked = _NOTHING_ASKED,
    ) -> Callable[[], None]:
        """Return what keeps a conversation that has been answered, when the loop calls it; `too_long` for one that is.

        `names` are those of namespaces' functions that it may have called. May be called from any thread.
        """
        if self._store is None:
            return lambda: None
        encode = msgspec.json.encode
        parts = (encode(items), encode(messages), encode(names or {}), response)
        num_objects = _num_objects(messages) + 2 * len(items) + len(names or {})
        num_bytes = sum(map(len, parts)) + _OBJECT_BYTES * num_objects
        if max(num_bytes, len(asked.items)) > MAX_BYTES_OF_ONE:
            return too_long
        data = Conversation(*parts, asked.items, asked.answer.encode()).joined()
        return partial(self._write, response_name(response_id, tenant), data)

    def _write(self, name: str, data: bytes) -> None:
        assert self._store is not None
        try:
            self._store.write(name, data)
        except OSError as error:
            log.warning("response_not_kept", reason=error.strerror or str(error), num_bytes=len(data))

    def keep_state(self, response_id: str, tenant: bytes, response: bytes, asked: Asked) -> None:
        """Keep a response that is under way. Raises OSError, and RequestError (413) for one that is very long."""
        if max(len(response), len(asked.items)) > MAX_BYTES_OF_ONE:
            text = f"background: what nobody waits for is kept, and this takes more than {MAX_BYTES_OF_ONE} bytes"
            text += ": send it without 'background', or with a shorter input"
            raise RequestError(text, param="background", code="request_too_large", status=413)
        self._write_state(response_id, tenant, response, asked)

    def change_state(self, response_id: str, tenant: bytes, response: bytes) -> None:
        """Keep one that is kept already as it goes on, or as it has ended without an answer. Raises OSError."""
        found = self._find(response_id, tenant, "input", "answer")
        self._write_state(response_id, tenant, response, _NOTHING_ASKED if found is None else found.asked)

    def _write_state(self, response_id: str, tenant: bytes, response: bytes, asked: Asked) -> None:
        if self._store is not None:
            state = Conversation(b"[]", b"", b"{}", response, asked.items, asked.answer.encode())
            self._store.write(response_name(response_id, tenant), state.joined())

    def find(self, response_id: object, tenant: bytes) -> Earlier:
        """Return the conversation that ends with this response. May be called from any thread.

        Raises RequestError (400), also for what is not kept, as OpenAI has it.
        """
        name = "previous_response_id"
        if not isinstance(response_id, str):
            raise RequestError(f"{name} must be a string, got {shown(response_id)}", param=name)
        found = self._find(response_id, tenant, "items", "messages", "names", "input")
        if found is None:
            raise RequestError(
                f"{name}: the response {clip(response_id)} is not kept here (any more); send its items as input",
                param=name,
                code="previous_response_not_found",
            )
        return found.told(name)

    def num_bytes(self, response_id: object, tenant: bytes) -> int:
        """Return how many bytes `find` reads; 0 for what is not kept."""
        if self._store is None or not isinstance(response_id, str):
            return 0
        return self._store.size(response_name(response_id, tenant))

    def find_items(
        self, item_ids: Iterable[object], tenant: bytes, earlier: bytes = b"[]"
    ) -> dict[object, msgspec.Raw]:
        """Return those of the items that are kept, as JSON, by id. May be called from any thread.

        An id of this server tells its response; a client's own is looked for in `earlier`, the items of the
        conversation that goes on. Each response is looked through once, and no item is decoded: one may have thousands,
        and be named as often. Raises RequestError (400) where they are too much together.
        """
        wanted, missing = dict[tuple[str, bool], set[str]](), set[str]()  # by the response's id, and part
        for item_id in item_ids:
            if isinstance(item_id, str):
                missing.add(item_id)
                if (named := _ITEM_ID.fullmatch(item_id)) is not None:
                    of = f"{RESPONSE_PREFIX}{named[1]}", named[2] is not None
                    wanted.setdefault(of, set()).add(item_id)
        found: dict[object, msgspec.Raw] = {}
        num_bytes = 0
        for (response_id, is_input), own in wanted.items():
            if (kept := self._find(response_id, tenant, "input" if is_input else "items")) is not None:
                num_bytes += _take_items(kept.input if is_input else kept.items, own, found, num_bytes)
        if missing := missing - found.keys():
            _take_items(earlier, missing, found, num_bytes)
        return found

    def response(self, response_id: str, tenant: bytes) -> bytes:
        """Return a response as it was answered. Raises RequestError (404)."""
        return bytes(self._named(response_id, tenant, "response").response)

    def input(self, response_id: str, tenant: bytes) -> list[tuple[str, msgspec.Raw]]:
        """Return the items that a response answers, by id, earlier turns included. Raises RequestError (404)."""
        return [(_named(item).id, item) for item in _items_of(self._named(response_id, tenant, "input").input)]

    def forget(self, response_id: str, tenant: bytes) -> str:
        """Return the name of the answer that it was told from; empty: there is none. Raises RequestError (404)."""
        answer = self._named(response_id, tenant, "answer").asked.answer
        assert self._store is not None
        self._store.delete(response_name(response_id, tenant))
        return answer

    def _named(self, response_id: str, tenant: bytes, *parts: str) -> Conversation:
        found = self._find(response_id, tenant, *parts)
        if found is None:
            text = f"the response {clip(response_id)} is not kept here (any more)"
            raise RequestError(text, param="response_id", code="response_not_found", status=404)
        return found

    def _find(self, response_id: str, tenant: bytes, *parts: str) -> Conversation | None:
        """Return what is kept, of which these parts are looked at; None: they are not whole, or it is not here."""
        data = None if self._store is None else self._store.read(response_name(response_id, tenant))
        return None if data is None else Conversation.parted(data, parts)


def too_long() -> None:
    """Keep nothing of a conversation that is too long."""


def ids_of(items: Part) -> set[str]:
    """Return the ids of items that are kept."""
    return {_named(item).id for item in _items_of(items)}


def _take_items(items: Part, wanted: set[str], found: dict[object, msgspec.Raw], num_before: int) -> int:
    """Add those that are wanted, and return how many bytes they have; `num_before`: those of others."""
    num_bytes = 0
    for item in _items_of(items):
        if (name := _named(item).id) in wanted:
            num_bytes += len(item)
            if num_before + num_bytes > MAX_BYTES_OF_ONE:
                raise RequestError(f"input: refers to items of more than {MAX_BYTES_OF_ONE} bytes", param="input")
            found[name] = item.copy()  # else each would hold all of its answer
    return num_bytes


def response_name(response_id: str, tenant: bytes) -> str:
    """Return the name under which a caller's response is kept."""
    return name_of_file(tenant, response_id.encode(errors="surrogatepass"))


def _num_objects(messages: Sequence[Message]) -> int:
    """Count what takes memory beside its text when messages are read: of many short ones, ten times that."""
    calls = [calls for message in messages if isinstance(calls := message.get("tool_calls"), list)]
    return len(messages) + 2 * sum(map(len, calls))
