"""One line of a batch as a call of the router's own API: the way that a client's request goes, without a connection.

    body ─> endpoint (fields, prompt, admission, queue, placement) ─> reply ─> status and body

The request is marked as one that nobody waits for: no quota is taken, and it makes way for all others.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.types import Message, Scope, Send

from ...common.clock import Clock
from ..api.body import WholeBody
from ..api.middleware import Endpoint, RequestContext, enter, leave, log_fault, send_part
from ..state.errors import HttpFailure, StreamError, failure_of
from ..state.objectives import BACKGROUND_CLASS


@dataclass(slots=True, frozen=True)
class CallAnswer:
    """An answer as a client would have got it."""

    status: int
    request_id: str
    body: bytes
    retry_after_s: float | None = None  # where another try may succeed
    code: str | None = None  # of an error: what went wrong


class LineCaller(Protocol):
    """Asks a line's body of an endpoint."""

    async def ask(self, endpoint: str, body: bytes, tenant: bytes) -> CallAnswer: ...


class EndpointCalls:
    """`EndpointCalls` asks the endpoints of this router, by their paths."""

    def __init__(self, endpoints: Mapping[str, Endpoint], clock: Clock) -> None:
        self.endpoints = endpoints
        self._clock = clock

    async def ask(self, endpoint: str, body: bytes, tenant: bytes) -> CallAnswer:
        """Return the answer, errors included. A cancelled call gives back everything that it holds."""
        kept = _Kept()
        request_id, receive = secrets.token_hex(16), WholeBody(body)
        context = RequestContext(
            request_id,
            request_id,
            self._clock.now(),
            kept.send,
            partial(send_part, kept.send),
            headers=receive.headers,
            tenant=tenant,
            request_class=BACKGROUND_CLASS,
            is_background=True,
        )
        scope: Scope = {"type": "http", "method": "POST", "path": endpoint, "headers": [*receive.headers.items()]}
        enter(scope, context)
        try:
            reply = await self.endpoints[endpoint](Request(scope, receive))
            await reply(scope, receive, partial(_noting_status, context, kept.send))
        except Exception as error:
            log_fault(error, request_id)
            return _refusal(failure_of(error), request_id)
        finally:
            leave(scope)
        if not kept.status:  # it was cut before it had begun
            return _refusal(failure_of(StreamError("the line was cut off", "request_aborted", 503)), request_id)
        body = b"".join(kept.parts)
        code = _code(body) if kept.status >= 400 else None
        return CallAnswer(kept.status, request_id, body, kept.retry_after_s, code)


def _refusal(failure: HttpFailure, request_id: str) -> CallAnswer:
    return CallAnswer(failure.status, request_id, failure.body, failure.retry_after_s, failure.code)


class _Error(msgspec.Struct):
    code: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error


def _code(body: bytes) -> str | None:
    """Return the code that an error tells; None: it tells none."""
    try:
        return msgspec.json.decode(body, type=_ErrorBody).error.code
    except msgspec.MsgspecError:
        return None


@dataclass(slots=True)
class _Kept:
    """The answer so far."""

    status: int = 0
    retry_after_s: float | None = None
    parts: list[bytes] = field(default_factory=list)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            seconds = dict(message.get("headers", ())).get(b"retry-after", b"")
            self.retry_after_s = float(seconds) if seconds.isdigit() else None
        else:
            self.parts.append(message.get("body", b""))


async def _noting_status(context: RequestContext, send: Send, message: Message) -> None:
    if message["type"] == "http.response.start":
        context.status = message["status"]
    await send(message)
