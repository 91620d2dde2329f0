"""uvicorn's HTTP protocol with an end for clients that are slow on purpose.

    connected or between requests   ->  uvicorn's keep-alive limit           then closed
    a head has begun                ->  head complete within HEAD_LIMIT_S    else closed
    body                            ->  `read_body` has a deadline           else 408
    not reading an answer           ->  the write buffer drains within WRITE_LIMIT_S, else the connection is aborted:
                                        the answer's watcher sees a client that left

Bytes that are no HTTP at all are answered in the API's error shape.
"""

from __future__ import annotations

import asyncio

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from ..common.errors import RequestError
from .errors import failure_of

HEAD_LIMIT_S = 5.0
WRITE_LIMIT_S = 30.0
MAX_HEAD_BYTES = 64 * 2**10


class DeadlineProtocol(HttpToolsProtocol):
    """One connection."""

    head_limit_s = HEAD_LIMIT_S
    write_limit_s = WRITE_LIMIT_S

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._stop_head_timer()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_limit_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        failure = failure_of(RequestError("this is not HTTP/1.1", code="invalid_http"))
        head = [b"HTTP/1.1 400 Bad Request", b"connection: close", b"content-length: %d" % len(failure.body)]
        head += [name + b": " + value for name, value in failure.headers]
        self.transport.write(b"\r\n".join([*head, b"", failure.body]))
        self.transport.close()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_bytes = 0
            self._head_timer = self.loop.call_later(self.head_limit_s, self.transport.close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
