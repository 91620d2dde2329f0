"""Around every HTTP request: its head, its id, its key, its errors, its count.

    head is sound ─> preflight of a web page? ─> `_admit`: by path, a key or a right name for this server ─> endpoint

The id inside is minted here. A client's X-Request-Id is only echoed and logged, cleaned: it keys nothing. Where keys
are set, every path but the health probes needs one, unknown paths included, before the body is read.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...common.clock import Clock
from ...common.errors import CapacityError, RequestError
from ..access.cors import Cors, Headers
from ..access.hosts import HostNames
from ..access.keys import ApiKeys, sent_key
from ..access.quota import Allowance, QuotaExceeded
from ..http.stream_writer import CHUNK_ENCODER, ChunkEncoder
from ..http.ways_out import send_failure
from ..kept.asking import KEY_HEADER
from ..kept.kept_answer import AnswerKey
from ..state.errors import HttpFailure, StreamError, failure_of, log_failure, unknown_path
from ..state.objectives import DEFAULT_CLASS
from .body import ClientGone

OPEN_PATHS = frozenset({"/live", "/ready", "/health", "/ping"})
CLIENT_CLOSED = 499  # for counts and logs: no one is there to read a status
_CONTEXT = "kvferry.context"
_ONCE = (b"host", b"authorization", b"x-api-key", b"content-type", b"content-encoding", b"origin", KEY_HEADER)
IGNORED_HEADER = b"x-kvferry-ignored"
_MAX_IGNORED, _MAX_IGNORED_BYTES = 16, 512
_NOT_IN_A_LIST = re.compile(rb"[^A-Za-z0-9._,\[\]-]")
_NOT_IN_AN_ID = re.compile(rb"[^A-Za-z0-9._:/+=@-]+")

Endpoint = Callable[[Request], Awaitable[ASGIApp]]  # its answer is an application
ErrorShape = Callable[[str, HttpFailure], bytes]  # a request's id and its error, as the endpoint words them
ErrorBody = Callable[[HttpFailure], bytes]
WritePart = Callable[[bytes], Awaitable[None]]  # a part of a body whose length was not announced


def failure_body(failure: HttpFailure) -> bytes:
    return failure.body


@dataclass(slots=True)
class RequestContext:
    """One HTTP request. Times are of the middleware's clock."""

    request_id: str
    shown_id: str  # what x-request-id says: the client's own where it sent one
    started_s: float
    send: Send
    write: WritePart  # a part of a stream
    chunk_encoder: ChunkEncoder | None = None  # the server's own way for them, where it lends one
    headers: Mapping[bytes, bytes] = field(default_factory=dict)  # by name in lower case
    tenant: bytes = b""  # whose key it came with; empty: there are no keys
    allowance: Allowance | None = None  # what it holds of the tenant's quota
    timeout_s: float | None = None  # what the client gives us, from `started_s` on
    request_class: str = DEFAULT_CLASS
    answer_key: AnswerKey | None = None  # under which its answer is kept; None: the client gave none
    run: str = ""  # of an answer that goes on: workers may still know the one of the router that began it
    is_background: bool = False  # nobody waits for it: no quota, and it makes way for all others
    error_body: ErrorBody = failure_body
    ignored: list[str] = field(default_factory=list)  # fields of its body that had no effect
    marks: dict[str, float] = field(default_factory=dict)  # end of each phase before the dispatcher's
    status: int | None = None  # sent

    def header(self, name: str) -> str | None:
        """Return what the client says in a header; None: nothing."""
        value = self.headers.get(name.encode())
        return None if value is None else value.decode("latin-1")


def enter(scope: Scope, context: RequestContext) -> None:
    """Make `context` the one of this scope."""
    scope[_CONTEXT] = context


def leave(scope: Scope) -> None:
    """Part a scope from its context, which leads back to it."""
    del scope[_CONTEXT]


def context_of(scope: Scope) -> RequestContext:
    context = scope[_CONTEXT]
    assert isinstance(context, RequestContext)
    return context


def check_head(scope: Scope, headers: Mapping[bytes, bytes]) -> None:
    """Refuse what a server must not guess about: which version of HTTP this is, for whom, from whom."""
    version = scope.get("http_version", "1.1")
    if version not in ("1.0", "1.1"):
        raise RequestError(f"HTTP/{version} is not spoken here", code="unsupported_http_version", status=505)
    if b"host" not in headers and version == "1.1":
        raise RequestError("the request names no Host", code="invalid_http")
    if len(headers) < len(scope["headers"]):  # some name more than once
        names = [name for name, _ in scope["headers"]]
        for name in _ONCE:
            if names.count(name) > 1:
                raise RequestError(f"the request has more than one {name.decode()}", code="invalid_http")


class ResponseObserver(Protocol):
    def on_response(self, status: int) -> None: ...

    def on_auth_failure(self) -> None:
        """A request came without a right key."""
        ...

    def on_slow_client(self, kind: str) -> None:
        """A client was cut for being slow: here, with its body."""
        ...

    def on_rejected(self, reason: str) -> None:
        """A request was refused for want of room: here, of its key's quota."""
        ...


class RequestMiddleware:
    """`RequestMiddleware` is around every request; `MiddlewareAdapter` puts it around a framework's application."""

    def __init__(
        self,
        *,
        keys: ApiKeys,
        clock: Clock,
        observer: ResponseObserver,
        hosts: HostNames | None,
        cors: Cors,
        error_shapes: Mapping[str, ErrorShape],
    ) -> None:
        """`hosts`: the names of this server, where a request must have one of them. `cors`: what web pages may do.

        `error_shapes`: those of a path and all below it, where they are not OpenAI's but Anthropic's.
        """
        self._error_shapes = error_shapes
        self._hosts = hosts
        self._cors = cors
        self._keys = keys
        self._clock = clock
        self._observer = observer

    async def serve(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        """Have an HTTP request answered by this endpoint."""
        headers = dict(scope["headers"])
        context = self._open(headers, scope, send)
        enter(scope, context)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *self._headers(context)]
            await send(message)

        try:
            check_head(scope, headers)
            preflight = self._cors.preflight(scope["method"], headers)
            if preflight is not None:
                await _send_preflight(send_with_headers, preflight)
            else:
                self._admit(context, scope["path"])
                answer = await endpoint(Request(scope, receive))
                await answer(scope, receive, send_with_headers)
        except ClientGone:
            context.status = CLIENT_CLOSED
        except Exception as error:
            await self._refuse(context, error, send_with_headers)
        finally:
            self._observer.on_response(context.status or CLIENT_CLOSED)
            if context.allowance is not None:
                context.allowance.leave()
            leave(scope)

    def _admit(self, context: RequestContext, path: str) -> None:
        """The one place that says what a path needs. Raises RequestError (401, 403)."""
        if path not in OPEN_PATHS:
            if self._hosts is not None:
                self._hosts.check(context.headers.get(b"host", b""))
            context.tenant = self._keys.check(sent_key(context.headers))

    def _open(self, headers: dict[bytes, bytes], scope: Scope, send: Send) -> RequestContext:
        request_id = secrets.token_hex(16)
        shown = _NOT_IN_AN_ID.sub(b"", headers.get(b"x-request-id", b"")[:1024])[:128].decode()
        chunk_encoder: ChunkEncoder | None = scope.get(CHUNK_ENCODER)
        path = f"{scope['path']}/"  # below one that is served, too: its clients parse its shape
        shapes = (shape for top, shape in self._error_shapes.items() if path.startswith(f"{top}/"))
        bodies = (partial(shape, shown or request_id) for shape in shapes)
        write: WritePart = partial(send_part, send) if chunk_encoder is None else chunk_encoder.send
        return RequestContext(
            request_id,
            shown or request_id,
            self._clock.now(),
            send,
            write,
            chunk_encoder,
            headers,
            error_body=next(bodies, failure_body),
        )

    def _headers(self, context: RequestContext) -> list[tuple[bytes, bytes]]:
        elapsed_ms = int((self._clock.now() - context.started_s) * 1000)
        headers = [(b"x-request-id", context.shown_id.encode()), (b"openai-processing-ms", b"%d" % elapsed_ms)]
        if context.error_body is not failure_body:
            headers.append((b"request-id", context.shown_id.encode()))  # its name where errors have another shape
        if context.ignored:
            names = ",".join(context.ignored[:_MAX_IGNORED]).encode("ascii", "replace")
            headers.append((IGNORED_HEADER, _NOT_IN_A_LIST.sub(b"?", names)[:_MAX_IGNORED_BYTES]))
        if b"origin" in context.headers:
            headers += self._cors.headers(context.headers)
        return headers if context.allowance is None else headers + context.allowance.headers

    async def _refuse(self, context: RequestContext, error: Exception, send: Send) -> None:
        self._count(error)
        log_fault(error, context.request_id)
        if context.status is not None:  # the head is out: a broken connection is the only honest end
            raise error
        failure = failure_of(error)
        if isinstance(error, QuotaExceeded) and context.allowance is None:
            failure = replace(failure, more_headers=tuple(error.allowance.headers))
        await send_failure(send, failure, context.error_body(failure))

    def _count(self, error: Exception) -> None:
        match error:
            case RequestError(status=401):
                self._observer.on_auth_failure()
            case RequestError(status=408):
                self._observer.on_slow_client("body")
            case QuotaExceeded():
                self._observer.on_rejected("quota")


class MiddlewareAdapter:
    """ASGI middleware; the outermost of ours."""

    def __init__(self, app: ASGIApp, middleware: RequestMiddleware) -> None:
        self._app = app
        self._middleware = middleware

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":  # nothing else is served: no web sockets
            await self._middleware.serve(self._endpoint, scope, receive, send)

    async def _endpoint(self, request: Request) -> ASGIApp:
        return self._app


async def on_no_endpoint(request: Request, error: Exception) -> Response:
    """Answer what Starlette itself refuses: a path that does not exist, or a method that is not the path's."""
    assert isinstance(error, HTTPException)
    shape: ErrorBody = getattr(request.scope.get(_CONTEXT), "error_body", failure_body)  # admins' have none
    if error.status_code == 404:
        return failure_response(failure_of(unknown_path(request.url.path)), shape)
    message = f"{request.method[:16]} {request.url.path[:64]}: {error.detail}"
    failure = failure_of(RequestError(message, code="method_not_allowed", status=error.status_code))
    return failure_response(replace(failure, more_headers=((b"allow", ", ".join(_methods(request)).encode()),)), shape)


def _methods(request: Request) -> list[str]:
    """Return all methods of a path: each may have a route of its own, and Starlette's error names one route's."""
    methods: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return sorted(methods)


def failure_response(failure: HttpFailure, error_body: ErrorBody = failure_body) -> Response:
    response = Response(error_body(failure), failure.status)
    response.raw_headers.extend(failure.headers)
    return response


def log_fault(error: Exception, request_id: str) -> None:
    """Tell the log of an error that is a bug, or the disk's, and no answer to what a client asked."""
    if not isinstance(error, (RequestError, CapacityError, StreamError)):
        log_failure("request_error", error, request_id=request_id)


async def send_part(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})


async def _send_preflight(send: Send, headers: Headers) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
