"""Around every HTTP request: its id, its key, its errors, its count.

The id inside is minted here. A client's X-Request-Id is only echoed and logged, cleaned: it keys nothing. Where keys
are set, every path but the health probes needs one, unknown paths included, before the body is read.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..common.clock import Clock
from ..common.errors import CapacityError, RequestError
from .body import ClientGone
from .errors import Failure, failure_of
from .request import StreamError

OPEN_PATHS = frozenset({"/live", "/ready", "/health"})
CLIENT_CLOSED = 499  # for counts and logs: no one is there to read a status
_CALL = "kvferry.call"
_NOT_IN_AN_ID = re.compile(rb"[^A-Za-z0-9._:/+=@-]+")

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Call:
    """One HTTP request. Times are of the frame's clock."""

    request_id: str
    shown_id: str  # what x-request-id says: the client's own where it sent one
    started_s: float
    send: Send  # the server's own: one hop less for each streamed token
    marks: dict[str, float] = field(default_factory=dict)  # end of each phase before the dispatcher's
    status: int | None = None  # sent


def call_of(scope: Scope) -> Call:
    call = scope[_CALL]
    assert isinstance(call, Call)
    return call


class ApiKeys:
    """Compares hashes in constant time, and always with every key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = [_digest(key.encode()) for key in keys]

    def check(self, authorization: bytes) -> None:
        if self._hashes and not self._allows(authorization):
            raise RequestError("the API key is missing or wrong", code="invalid_api_key", status=401)

    def _allows(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self._hashes]
        return any(matches) and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class ResponseObserver(Protocol):
    def on_response(self, status: int) -> None: ...


class Frame:
    """ASGI middleware; the outermost of ours."""

    def __init__(self, app: ASGIApp, *, keys: ApiKeys, clock: Clock, observer: ResponseObserver) -> None:
        self._app = app
        self._keys = keys
        self._clock = clock
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        call = self._open(headers, send)
        scope[_CALL] = call

        async def send_framed(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *self._headers(call)]
            await send(message)

        try:
            if scope["path"] not in OPEN_PATHS:
                self._keys.check(headers.get(b"authorization", b""))
            await self._app(scope, receive, send_framed)
        except ClientGone:
            call.status = CLIENT_CLOSED
        except Exception as error:
            await self._refuse(call, error, send_framed)
        finally:
            self._observer.on_response(call.status or CLIENT_CLOSED)

    def _open(self, headers: dict[bytes, bytes], send: Send) -> Call:
        request_id = uuid.uuid4().hex
        shown = _NOT_IN_AN_ID.sub(b"", headers.get(b"x-request-id", b"")[:1024])[:128].decode()
        return Call(request_id, shown or request_id, self._clock.now(), send)

    def _headers(self, call: Call) -> list[tuple[bytes, bytes]]:
        elapsed_ms = int((self._clock.now() - call.started_s) * 1000)
        return [(b"x-request-id", call.shown_id.encode()), (b"openai-processing-ms", b"%d" % elapsed_ms)]

    async def _refuse(self, call: Call, error: Exception, send: Send) -> None:
        if not isinstance(error, (RequestError, CapacityError, StreamError)):
            log.exception("request_error", request_id=call.request_id)
        if call.status is not None:  # the head is out: a broken connection is the only honest end
            raise error
        await send_failure(send, failure_of(error))


async def send_failure(send: Send, failure: Failure) -> None:
    body = failure.body
    headers = [*failure.headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": failure.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
