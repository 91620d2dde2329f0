"""uvicorn's HTTP protocol with an end for clients that are slow on purpose.

    connected or between requests   ->  a request begins within the keep-alive limit   else closed
    a head has begun                ->  head complete within HEAD_LIMIT_S              else closed
    body                            ->  `read_body` has a deadline                     else 408
    not reading an answer           ->  the write buffer drains within WRITE_LIMIT_S, else the connection is aborted:
                                        the answer's watcher sees a client that left
    answered, to be closed          ->  what is left to write gone within WRITE_LIMIT_S, else aborted

A client is read while it is answered, so that its leaving is seen at once; that is why a second request behind one
that is not answered yet is dropped, and the connection closed after the answer. An answer that comes before its
request's body is whole is followed by a short time of reading on: a reset would take the answer from the client.
Bytes that are no HTTP at all are answered in the API's error shape.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Self

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from ..common.errors import CapacityError, RequestError
from .connection_limits import Connections
from .errors import Failure, failure_of
from .frame import CHUNKS
from .outlet import Chunks, Outlet, Turn

HEAD_LIMIT_S = 5.0
WRITE_LIMIT_S = 30.0
LINGER_S = 2.0  # reading on after an early answer
LINGER_BYTES = 64 * 2**20
MAX_HEAD_BYTES = 64 * 2**10
_STATUS_LINES = {
    400: b"HTTP/1.1 400 Bad Request",
    431: b"HTTP/1.1 431 Request Header Fields Too Large",
    503: b"HTTP/1.1 503 Service Unavailable",
}


_errors_only = logging.getLogger("uvicorn.error.http")
_errors_only.setLevel(logging.ERROR)


class _Unwanted(Exception):
    """Stops the parser: what follows is not read."""


class DeadlineProtocol(HttpToolsProtocol):
    """One connection."""

    head_limit_s = HEAD_LIMIT_S
    write_limit_s = WRITE_LIMIT_S
    linger_s = LINGER_S
    books: Connections
    turn: Turn

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.logger = _errors_only  # what clients send is not worth a line
        self._wait_timer: asyncio.TimerHandle | None = None  # for a request, then for its head
        self._write_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._is_reading_head = False
        self._num_discarded: int | None = None  # None: what comes is parsed

    @classmethod
    def keeping(cls, books: Connections) -> type[Self]:
        """The protocol of a server whose connections are in these books."""
        return type(cls.__name__, (cls,), {"books": books, "turn": Turn()})

    # --- the connection ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.outlet = Outlet(transport, self.turn)
        full = self.books.open(self, self.client[0] if self.client else "")
        if full:
            whose = "from this address" if full == "address" else "to this server"
            self._refuse(failure_of(CapacityError(f"there are too many connections {whose}", status=503)))
        else:
            self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self.books.close(self)
        self._await_nothing()
        if self._end_timer is not None:
            self._end_timer.cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._num_discarded is not None:
            self._num_discarded += len(data)
            if self._num_discarded > LINGER_BYTES:
                self.transport.abort()
            return
        super().data_received(data)
        if self._is_reading_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                message = f"the request's head has more than {MAX_HEAD_BYTES} bytes"
                self._refuse(failure_of(RequestError(message, code="request_head_too_large", status=431)))

    def evict(self) -> None:
        """A newcomer needs the room, and nothing is under way here."""
        self.transport.abort()

    @property
    def has_request(self) -> bool:
        """One is being read or answered."""
        return self._is_reading_head or (self.cycle is not None and not self.cycle.response_complete)

    def end(self) -> None:
        """Close when everything is written; a client that goes on with a body is read a while longer."""
        self._await_nothing()
        if self.transport.is_closing() or self._end_timer is not None:
            return
        self.outlet.flush()
        if self.cycle is not None and self.cycle.more_body:
            self._discard()
            self.flow.resume_reading()
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self._end_timer = self.loop.call_later(self.linger_s, self.transport.abort)
        else:
            self.transport.close()
            self._end_timer = self.loop.call_later(self.write_limit_s, self.transport.abort)

    def _discard(self) -> None:
        if self._num_discarded is None:
            self._num_discarded = 0

    # --- reading ----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            self._discard()
            raise _Unwanted
        super().on_message_begin()
        self._head_bytes = 0
        self._is_reading_head = True
        self._set_wait_timer(self.head_limit_s, "head")

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._is_reading_head = False
        self._await_nothing()
        self.books.work(self)
        self.cycle.transport = _Closer(self)  # type: ignore[assignment]
        self.scope[CHUNKS] = Chunks(self.outlet, self.flow)  # type: ignore[literal-required]

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # ours does not start anew with every byte
        if self.cycle.more_body:
            self.end()
        elif not self.transport.is_closing():
            self.books.wait(self)
            self._await_request()

    def _unsupported_upgrade_warning(self) -> None:
        """The request asked for another protocol: it is answered as it stands, and then nothing more."""
        self._discard()
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        if self._num_discarded is None:
            self._refuse(failure_of(RequestError("this is not HTTP/1.1", code="invalid_http")))

    def _refuse(self, failure: Failure) -> None:
        """Answer without the application; the connection ends."""
        head = [_STATUS_LINES[failure.status], b"connection: close", b"content-length: %d" % len(failure.body)]
        head += [name + b": " + value for name, value in failure.headers]
        self._discard()
        self._is_reading_head = False
        self.outlet.flush()
        self.transport.write(b"\r\n".join([*head, b"", failure.body]))
        self.transport.close()
        self._end_timer = self._end_timer or self.loop.call_later(self.linger_s, self.transport.abort)

    # --- time limits ------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_limit_s, self._cut, "read")

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        self._cut("idle")

    def _await_request(self) -> None:
        self._set_wait_timer(self.timeout_keep_alive, "idle")

    def _set_wait_timer(self, limit_s: float, kind: str) -> None:
        self._await_nothing()
        self._wait_timer = self.loop.call_later(limit_s, self._cut, kind)

    def _await_nothing(self) -> None:
        if self._wait_timer is not None:
            self._wait_timer.cancel()
            self._wait_timer = None

    def _cut(self, kind: str) -> None:
        self.books.observer.on_slow_client(kind)
        if kind == "read":
            self.transport.abort()
        else:
            self.end()


class _Closer:
    """A request's way to its transport: it writes to the outlet, and leaves the end to the protocol."""

    __slots__ = ("_protocol", "is_closing", "write")

    def __init__(self, protocol: DeadlineProtocol) -> None:
        self._protocol = protocol
        self.write = protocol.outlet.write
        self.is_closing = protocol.transport.is_closing

    def close(self) -> None:
        self._protocol.end()
