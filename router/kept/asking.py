"""Clients name a request that they may send again, in headers: read here, and refused where they cannot be read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import msgspec

from ...common.errors import RequestError
from .files import answer_of_task
from .kept_answer import AnswerKey

KEY_HEADER, AFTER_HEADER = b"idempotency-key", b"last-event-id"
REPEATED_HEADER = (b"idempotent-replayed", b"true")  # Stripe's name: of an answer that was told before
_KEY = re.compile(rb"[\x21-\x7e]{1,255}")
_AFTER = re.compile(rb"[0-9]{1,9}")
_encode = msgspec.json.Encoder(order="deterministic").encode


def key_name(headers: Mapping[bytes, bytes], tenant: bytes) -> str | None:
    """Return a client's key as a name in hexadecimal digits; None: it gives none. Keys of different callers never meet.

    Raises RequestError for a header that is none.
    """
    key = headers.get(KEY_HEADER)
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        raise RequestError(
            "Idempotency-Key must be 1 to 255 visible ASCII characters",
            param="Idempotency-Key",
            code="invalid_idempotency_key",
        )
    return name_of_file(tenant, key)


def name_of_file(tenant: bytes, key: bytes) -> str:
    """Return a name in hexadecimal digits for what a caller knows by `key`: those of different callers never meet."""
    return hashlib.blake2b(b"%d %b %b" % (len(tenant), tenant, key), digest_size=20).hexdigest()


def key_reused() -> RequestError:
    """Return the refusal of a request whose key stands for another one."""
    return RequestError(
        "this Idempotency-Key came with another request before: a new request needs a new key",
        param="Idempotency-Key",
        code="idempotency_key_reused",
        status=422,
    )


def answer_key(headers: Mapping[bytes, bytes], tenant: bytes, path: str, asked: object) -> AnswerKey | None:
    """Return the key under which a call's answer is kept; None: the client gives none. `asked`: its body, parsed.

    Raises RequestError for headers that cannot be read.
    """
    name, after = key_name(headers, tenant), headers.get(AFTER_HEADER, b"0") or b"0"
    if name is None:
        return None
    if not _AFTER.fullmatch(after):
        raise RequestError(
            "Last-Event-ID must be the number of an event of this answer",
            param="Last-Event-ID",
            code="invalid_last_event_id",
        )
    return AnswerKey(name, _digest(path, asked), int(after))


def own_key(task: str, path: str, asked: object, after: int) -> AnswerKey:
    """Return a key of the server's own, for an answer that goes on without its client, behind so many events.

    `task`: the name of the file that is there until it has ended.
    """
    return AnswerKey(answer_of_task(task), _digest(path, asked), after)


def one_key(clients: AnswerKey | None, own: AnswerKey | None) -> AnswerKey | None:
    """Return the key of an answer. Raises RequestError where the client names one that has a name of the server's."""
    if clients is not None and own is not None:
        text = "Idempotency-Key: a background response is found by its id"
        raise RequestError(text, param="Idempotency-Key", code="unsupported_value")
    return own or clients


def _digest(path: str, asked: object) -> bytes:
    return hashlib.blake2b(_encode([path, asked]), digest_size=20).digest()
