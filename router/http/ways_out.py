"""An answer's ways to its connection, as uvicorn takes them, and those of HTTP/1.0, whose clients know no chunks.

There the connection's end is the body's (RFC 9112, 6.1 and 6.3). What no application answers is here whole.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

from starlette.types import Send

from ..state.errors import HttpFailure
from .stream_writer import ChunkEncoder

_LINE = b"\r\n"
_CHUNKED = b"transfer-encoding: chunked\r\n"  # as uvicorn writes it where no length is announced
_INTERIM = b"HTTP/1.1 100"


class Closer:
    """A request's way to its transport: it writes to the stream writer, and leaves the end to the protocol."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(
        self, write: Callable[[bytes], None], close: Callable[[], None], is_closing: Callable[[], bool]
    ) -> None:
        self.write, self.close, self.is_closing = write, close, is_closing


class PlainEncoder(ChunkEncoder):
    """A `PlainEncoder` writes the parts of a body as they are."""

    __slots__ = ()

    def write(self, part: bytes) -> None:
        self._writer.write(part)


class Unframed:
    """`Unframed` writes what uvicorn writes of one answer, without the frames of its chunks."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._is_chunked: bool | None = None  # None: the head is to come

    def __call__(self, data: bytes) -> None:
        if self._is_chunked is None:
            if data.startswith(_INTERIM):
                return
            before, chunked, behind = data.partition(_CHUNKED)
            self._is_chunked, data = bool(chunked), before + behind
        elif self._is_chunked and data:
            size, _, data = data.partition(_LINE)
            data = data[: int(size, 16)]
        if data:
            self._write(data)


async def send_failure(send: Send, failure: HttpFailure, body: bytes) -> None:
    """Send a refusal; `body` is its own, or words it as its endpoint does."""
    headers = [*failure.headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": failure.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def last_answer(failure: HttpFailure) -> bytes:
    """Return a refusal as a connection carries it that ends with it."""
    fields = [*failure.headers, (b"content-length", b"%d" % len(failure.body)), (b"connection", b"close")]
    line = b"HTTP/1.1 %d %b" % (failure.status, HTTPStatus(failure.status).phrase.encode())
    return _LINE.join([line, *(b"%b: %b" % field for field in fields), b"", failure.body])
