"""A request's body: read with bounds and a deadline; and what every kind of body says.

Bodies of all calls together have a bound too: `BodyRoom` holds what is read until it has become token ids. What the
bytes say is `strict_json.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Protocol

from starlette.types import Message, Receive

from ...common.errors import CapacityError, RequestError
from ..state.errors import clip

MAX_BODY_BYTES = 32 * 2**20
MAX_HELD_BYTES = 256 * 2**20
MAX_VECTOR_BYTES = 512 * 2**20  # of embeddings, as they come from workers: they are held until their clients have them
BODY_TIMEOUT_S = 10.0


class ClientGone(Exception):
    """The client closed its connection before the request was whole or the answer was."""


class BodyRoom:
    """Bytes of bodies, or of what else calls have, that are held at the same time. Belongs to one loop."""

    def __init__(self, max_bytes: int = MAX_HELD_BYTES, what: str = "the bodies under way") -> None:
        self.max_bytes = max_bytes
        self.what = what
        self.num_bytes = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[HeldBody]:
        """One call's part, given back at the end of the block."""
        body = HeldBody(self)
        try:
            yield body
        finally:
            self.num_bytes -= body.num_bytes


class HeldBody:
    """The bytes of one call's body so far."""

    __slots__ = ("_room", "num_bytes")

    def __init__(self, room: BodyRoom) -> None:
        self._room = room
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Raises CapacityError (503) where those of all calls fill the room."""
        if self._room.num_bytes + num_bytes > self._room.max_bytes:
            raise CapacityError(f"{self._room.what} have {self._room.num_bytes} bytes already", status=503)
        self._room.num_bytes += num_bytes
        self.num_bytes += num_bytes


async def read_body(
    headers: Mapping[bytes, bytes],
    receive: Receive,
    held: HeldBody,
    *,
    max_bytes: int = MAX_BODY_BYTES,
    timeout_s: float = BODY_TIMEOUT_S,
) -> bytes:
    """The whole body. 413 as soon as the declared or the counted length passes `max_bytes`, 408 after `timeout_s`."""
    _check_kind(headers)
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(f"{declared[:20].decode()} bytes", max_bytes)
    return await read_in_time(receive, held, max_bytes, timeout_s)


async def read_in_time(receive: Receive, held: HeldBody, max_bytes: int, timeout_s: float) -> bytes:
    """Return the whole body, whatever its kind. Raises RequestError: 413 beyond `max_bytes`, 408 after `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(receive, held, max_bytes)
    except TimeoutError:
        raise RequestError(
            f"the request's body did not arrive within {timeout_s:g} s", code="request_timeout", status=408
        ) from None


async def _read(receive: Receive, held: HeldBody, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        held.add(len(part))
        if held.num_bytes > max_bytes:
            raise _too_large(f"more than {max_bytes} bytes", max_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _check_kind(headers: Mapping[bytes, bytes]) -> None:
    # A browser sends any other type to any host without asking: a page could then talk to a server on localhost.
    kind = headers.get(b"content-type", b"")
    if kind != b"application/json" and kind.partition(b";")[0].strip().lower() != b"application/json":
        raise _unsupported(f"the body must have Content-Type: application/json, got {clip(kind.decode('latin-1'))}")
    check_codings(headers)


def check_codings(headers: Mapping[bytes, bytes]) -> None:
    """Refuse a body that does not come as it is. Raises RequestError (415, 501)."""
    coding = headers.get(b"content-encoding", b"identity")
    if coding.strip().lower() != b"identity":  # a few bytes may unpack to gigabytes
        raise _unsupported(f"the body must come as it is, not with Content-Encoding: {clip(coding.decode('latin-1'))}")
    transfer = headers.get(b"transfer-encoding", b"chunked")
    if transfer.strip().lower() != b"chunked":  # RFC 9112, 6.1
        text = f"the body may be chunked, and no more: not Transfer-Encoding: {clip(transfer.decode('latin-1'))}"
        raise RequestError(text, code="unsupported_transfer_encoding", status=501)


def _unsupported(text: str) -> RequestError:
    return RequestError(text, code="unsupported_media_type", status=415)


def _too_large(size: str, max_bytes: int) -> RequestError:
    return RequestError(
        f"the request's body has {size}; the limit is {max_bytes}", code="request_too_large", status=413
    )


class CallBody(Protocol):
    """Fields that bodies of every kind of work have."""

    @property
    def num_choices(self) -> int: ...
    @property
    def priority(self) -> int | None: ...
    @property
    def cache_salt(self) -> str | None: ...
    @property
    def user(self) -> object: ...


def tenant_of(key: bytes, body: CallBody) -> str:
    """Return whose share of the service it counts for: its key's; where there are none, whom it names."""
    if key:
        return key.hex()
    named = body.user if isinstance(body.user, str) and body.user else body.cache_salt
    return hashlib.blake2b(named.encode(errors="surrogatepass"), digest_size=16).hexdigest() if named else ""


class WholeBody:
    """The receiving end of a call that comes by no connection: its body, and then nothing more."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self.headers = {b"content-type": b"application/json", b"content-length": b"%d" % len(body)}

    async def __call__(self) -> Message:
        if self._body is None:
            await asyncio.Event().wait()  # nobody leaves
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
