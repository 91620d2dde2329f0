"""A small HTTP/1.1 client whose cost per received chunk is a few microseconds.

The load client shares its cores with the servers that it measures, so body bytes go straight from the socket's
callback to the caller's `on_body`: no task is woken and nothing is queued for a chunk. Connections are kept and
used again. Knows no redirects, no compression, no proxies and no HTTP/2; a benchmark needs none of them.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import cast
from urllib.parse import urlsplit

import httptools

from ...common.errors import ConfigError, KVFerryError

OnHead = Callable[["ResponseHead"], None]
OnBody = Callable[[bytes], None]

_STALE_WITHIN_S = 0.1  # what is lost later may have been read, and computed for


class HttpError(KVFerryError):
    """No answer, or not all of it: refused, reset, closed early, or not HTTP."""


@dataclass(slots=True)
class ResponseHead:
    """Status and headers of one answer; header names in lower case."""

    status: int
    headers: dict[str, str]


class _Connection(asyncio.Protocol):
    """One socket; carries one exchange at a time. `done` is set when the answer's last byte is here."""

    def __init__(self) -> None:
        self._num_exchanges = 0
        self._written_s = 0.0
        self._lost_s: float | None = None
        self._has_heard = False  # anything, since the last request was written
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._head: ResponseHead | None = None
        self._on_head: OnHead | None = None
        self._on_body: OnBody | None = None
        self._done: asyncio.Future[ResponseHead] | None = None

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def was_stale(self) -> bool:
        """True where the server closed a kept connection just as it was written to, and read nothing of it."""
        is_kept = self._num_exchanges > 1 and not self._has_heard
        return is_kept and self._lost_s is not None and self._lost_s - self._written_s < _STALE_WITHIN_S

    async def exchange(self, request: bytes, on_head: OnHead | None, on_body: OnBody) -> ResponseHead:
        assert self._transport is not None
        assert self._done is None
        self._headers, self._head, self._has_heard = {}, None, False
        self._num_exchanges += 1
        self._on_head, self._on_body = on_head, on_body
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        self._note_written()
        asyncio.get_running_loop().call_soon(self._note_written)  # what holds the loop up until then is no wait
        try:
            return await self._done
        finally:
            self._done = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _note_written(self) -> None:
        self._written_s = perf_counter()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._has_heard = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(HttpError(f"unreadable answer: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost_s = perf_counter()
        head = self._head
        if head is not None and exc is None and not {"content-length", "transfer-encoding"} & head.headers.keys():
            self._finish(head)  # this body has no announced end: the close is its end
        else:
            self._fail(HttpError(f"connection closed before the end of the answer{f': {exc}' if exc else ''}"))

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._head = ResponseHead(self._parser.get_status_code(), self._headers)
        if self._on_head is not None:
            self._on_head(self._head)

    def on_body(self, body: bytes) -> None:
        if self._done is not None and self._on_body is not None:
            self._on_body(body)

    def on_message_complete(self) -> None:
        assert self._head is not None
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.close()
        self._finish(self._head)

    def _finish(self, head: ResponseHead) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(head)

    def _fail(self, error: HttpError) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class HttpClient:
    """Requests to one host. Not safe for use by several event loops."""

    def __init__(self, base_url: str, *, connect_timeout_s: float = 10.0) -> None:
        form = f"base URL {base_url!r}: expected http://HOST[:PORT] or https://HOST[:PORT]"
        try:
            parts = urlsplit(base_url)
            host, port = parts.hostname or "", parts.port
            is_address = bool(host.encode("idna")) and port != 0
        except ValueError as error:  # a port beyond 65535, a host that no name is
            raise ConfigError(f"{form}: {error}") from None
        if parts.scheme not in ("http", "https") or not is_address:
            raise ConfigError(form)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = host
        self._port = port or (443 if self._tls else 80)
        self._authority = parts.netloc.rpartition("@")[2]
        self._prefix = parts.path.rstrip("/")
        self._connect_timeout_s = connect_timeout_s
        self._idle: list[_Connection] = []

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        on_resend: Callable[[], None] | None = None,
        on_head: OnHead | None = None,
        on_body: OnBody,
    ) -> ResponseHead:
        """Returns when the whole answer was handed to `on_body`. Cancelling it closes the connection.

        A server may close a kept connection just as it is written to. Such a request is sent once more, over a new
        connection, and `on_resend` is told. Nothing else is: what a server took and dropped is lost.
        """
        request = self._render(method, path, body, headers or {})
        connection = self._kept() or await self._connect()
        try:
            return await self._exchange(connection, request, on_head, on_body)
        except HttpError:
            if not connection.was_stale:
                raise
        if on_resend is not None:
            on_resend()
        return await self._exchange(await self._connect(), request, on_head, on_body)

    async def read(
        self, method: str, path: str, *, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[ResponseHead, bytes]:
        """The same for an answer that is wanted whole."""
        received: list[bytes] = []
        head = await self.request(method, path, body=body, headers=headers, on_body=received.append)
        return head, b"".join(received)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _exchange(
        self, connection: _Connection, request: bytes, on_head: OnHead | None, on_body: OnBody
    ) -> ResponseHead:
        try:
            head = await connection.exchange(request, on_head, on_body)
        except BaseException:
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return head

    def _kept(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        except (OSError, TimeoutError) as error:
            reason = str(error) or f"no answer in {self._connect_timeout_s:g} s"
            raise HttpError(f"cannot connect to {self._host}:{self._port}: {reason}") from error
        return connection

    def _render(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        lines = [f"{method} {self._prefix}{path} HTTP/1.1", f"host: {self._authority}"]
        if body:
            lines += ["content-type: application/json", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        try:
            head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        except UnicodeEncodeError as error:
            seen = error.object[error.start : error.end]
            raise HttpError(f"{seen!r} cannot stand in the head of a request: a path or a key has it") from None
        return head + body
