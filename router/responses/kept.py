"""Conversations of /v1/responses are kept: `previous_response_id` goes on with one.

Items of answers are found by their ids, as clients that keep none of their own refer to them, and responses whole.

    items, messages, names, response   the parts of one conversation, each as JSON behind the lengths of all
"""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import structlog

from ...common.errors import RequestError
from ..kept.asking import name_of_file
from ..state.errors import clip, shown
from ..turns.places import Message
from .store import ResponseStore
from .tools import Names

RESPONSE_PREFIX = "resp_"
MAX_BYTES_OF_ONE = 4 * 2**20
_OBJECT_BYTES = 256  # of a message or a part of a call in memory, beside its text: a dict and what is in it
_HEADER = struct.Struct("<4s4I")
_FORMAT = b"kvr1"  # of the file: another one is not read

Item = Mapping[str, object]
_ITEM_ID = re.compile(r"[a-z]+_([0-9a-zA-Z-]+)_\d+")
_items_of = msgspec.json.Decoder(list[msgspec.Raw]).decode
_messages_of = msgspec.json.Decoder(list[Message]).decode
_names_of = msgspec.json.Decoder(Names).decode

log = structlog.get_logger(__name__)


def item_id(kind: str, response_id: str, index: int) -> str:
    """Return the id of an answer's item, which tells the answer's."""
    return f"{kind}_{response_id.removeprefix(RESPONSE_PREFIX)}_{index}"


class _Named(msgspec.Struct):
    id: str


_named = msgspec.json.Decoder(_Named).decode


@dataclass(slots=True, frozen=True)
class _Conversation:
    """The parts as they are kept; each is decoded by who needs it."""

    items: bytes | memoryview
    messages: bytes | memoryview
    names: bytes | memoryview
    response: bytes | memoryview

    def told(self, param: str) -> tuple[Sequence[Message], Names]:
        """Return the messages, and the names in them. Raises RequestError (400), which names `param`, without any."""
        if not self.messages:
            text = f"{param}: the response has no answer (yet): it is under way, or was cancelled, or has failed"
            raise RequestError(text, param=param, code="response_not_completed")
        return _messages_of(self.messages), _names_of(self.names)

    def joined(self) -> bytes:
        parts = (self.items, self.messages, self.names, self.response)
        return b"".join((_HEADER.pack(_FORMAT, *map(len, parts)), *parts))

    @classmethod
    def parted(cls, data: memoryview) -> _Conversation | None:
        """Return None for what is not whole, as a machine's crash may leave it."""
        if len(data) < _HEADER.size:
            return None
        form, *lengths = _HEADER.unpack_from(data)
        if form != _FORMAT or _HEADER.size + sum(lengths) != len(data):
            return None
        parts, start = [], _HEADER.size
        for length in lengths:
            parts.append(data[start : start + length])
            start += length
        return cls(*parts)


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
    ) -> Callable[[], None]:
        """Return what keeps a conversation that has been answered, when the loop calls it; nothing of one too long.

        `names` are those of namespaces' functions that it may have called. May be called from any thread.
        """
        if self._store is None:
            return lambda: None
        encode = msgspec.json.encode
        data = _Conversation(encode(items), encode(messages), encode(names or {}), response).joined()
        num_objects = _num_objects(messages) + 2 * len(items) + len(names or {})
        if len(data) + _OBJECT_BYTES * num_objects > MAX_BYTES_OF_ONE:
            return lambda: None
        return partial(self._write, response_name(response_id, tenant), data)

    def _write(self, name: str, data: bytes) -> None:
        assert self._store is not None
        try:
            self._store.write(name, data)
        except OSError as error:
            log.warning("response_not_kept", reason=error.strerror or str(error), num_bytes=len(data))

    def keep_state(self, response_id: str, tenant: bytes, response: bytes) -> None:
        """Keep a response that is under way. Raises OSError, also for one that is very long."""
        if len(response) > MAX_BYTES_OF_ONE:
            raise OSError(errno.EFBIG, f"it takes more than {MAX_BYTES_OF_ONE} bytes")
        self.change_state(response_id, tenant, response)

    def change_state(self, response_id: str, tenant: bytes, response: bytes) -> None:
        """Keep one that is kept already as it goes on, or as it has ended without an answer. Raises OSError."""
        if self._store is not None:
            self._store.write(response_name(response_id, tenant), _Conversation(b"[]", b"", b"{}", response).joined())

    def find(self, response_id: object, tenant: bytes) -> tuple[Sequence[Message], Names]:
        """Return the messages so far, and the names of namespaces' functions in them. May be called from any thread.

        Raises RequestError (404; 400 for no id).
        """
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
        return found.told(name)

    def num_bytes(self, response_id: object, tenant: bytes) -> int:
        """Return how many bytes of messages `find` reads; 0 for what is not kept."""
        found = self._find(response_id, tenant) if isinstance(response_id, str) else None
        return 0 if found is None else len(found.messages)

    def find_items(self, item_ids: Iterable[object], tenant: bytes) -> dict[object, msgspec.Raw]:
        """Return those of answers' items that are kept, as JSON, by id. May be called from any thread.

        Each answer is looked through once, and no item is decoded: an answer may have thousands, and be named as often.
        Raises RequestError (400) where they are too much together.
        """
        wanted: dict[str, set[str]] = {}  # by the answer's id
        for item_id in item_ids:
            if isinstance(item_id, str) and (named := _ITEM_ID.fullmatch(item_id)) is not None:
                wanted.setdefault(f"{RESPONSE_PREFIX}{named[1]}", set()).add(item_id)
        found: dict[object, msgspec.Raw] = {}
        num_bytes = 0
        for response_id, own in wanted.items():
            kept = self._find(response_id, tenant)
            for item in () if kept is None else _items_of(kept.items):
                if (name := _named(item).id) in own:
                    num_bytes += len(item)
                    if num_bytes > MAX_BYTES_OF_ONE:
                        text = f"input: refers to items of more than {MAX_BYTES_OF_ONE} bytes"
                        raise RequestError(text, param="input")
                    found[name] = item.copy()  # else each would hold its answer's file open
        return found

    def response(self, response_id: str, tenant: bytes) -> bytes:
        """Return a response as it was answered. Raises RequestError (404)."""
        return bytes(self._named(response_id, tenant).response)

    def input(self, response_id: str, tenant: bytes) -> tuple[Sequence[Message], Names]:
        """Return the messages that a response answers, and the names in them. Raises RequestError (404)."""
        messages, names = self._named(response_id, tenant).told("response_id")
        return messages[:-1], names

    def forget(self, response_id: str, tenant: bytes) -> None:
        """Raises RequestError (404)."""
        self._named(response_id, tenant)
        assert self._store is not None
        self._store.delete(response_name(response_id, tenant))

    def _named(self, response_id: str, tenant: bytes) -> _Conversation:
        found = self._find(response_id, tenant)
        if found is None:
            text = f"the response {clip(response_id)} is not kept here (any more)"
            raise RequestError(text, param="response_id", code="response_not_found", status=404)
        return found

    def _find(self, response_id: str, tenant: bytes) -> _Conversation | None:
        data = None if self._store is None else self._store.read(response_name(response_id, tenant))
        return None if data is None else _Conversation.parted(data)


def response_name(response_id: str, tenant: bytes) -> str:
    """Return the name under which a caller's response is kept."""
    return name_of_file(tenant, response_id.encode(errors="surrogatepass"))


def _num_objects(messages: Sequence[Message]) -> int:
    """Count what takes memory beside its text when messages are read: of many short ones, ten times that."""
    calls = [calls for message in messages if isinstance(calls := message.get("tool_calls"), list)]
    return len(messages) + 2 * sum(map(len, calls))
