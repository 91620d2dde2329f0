"""The content of a file: whole, or the ranges of it that a client asks for (RFC 9110, 14).

Range ─> not understood ─> as if it were not there
     └─> past the file ─> 416          some of it there ─> what is there
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from ...common.errors import RequestError
from ..api.middleware import failure_response
from ..state.errors import failure_of
from .files import StoredFile, no_file

_PIECE_BYTES = 64 * 2**10  # of a file, read and sent in one go
_RANGE = re.compile(r"([0-9]{0,99})-([0-9]{0,99})")  # first and last byte; without a first one: so many at the end


def content(path: Path, stored: StoredFile) -> Response:
    """Return a file, whose end is told with its last byte."""
    response = _Content(path, media_type="application/octet-stream", filename=stored.filename)
    if not stored.num_bytes:
        return Response(headers=dict(response.headers))
    response.file_id, response.num_bytes = stored.id, stored.num_bytes
    response.chunk_size = _PIECE_BYTES if stored.num_bytes % _PIECE_BYTES else _PIECE_BYTES - 1
    return response


class _Content(FileResponse):
    """A `FileResponse` without its own errors, which are plain text.

    One that sends nothing but whole pieces looks for another one at the end. A client that knows the length has its
    answer by then, and its next request on this connection would come before the end of this one: hence `chunk_size`.

    It looks for its file by name, and more than once: one that is deleted meanwhile is held open, and sent to its end.
    """

    file_id = ""
    num_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            opened = await asyncio.to_thread(open, self.path, "rb")
        except FileNotFoundError:
            raise no_file(self.file_id) from None
        with opened as file:
            self.path = f"/dev/fd/{file.fileno()}"
            await self._send(scope, receive, send)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        asked = headers.get("range")
        ranges = None if asked is None else _ranges(asked, self.num_bytes)
        if ranges == [] and "if-range" not in headers:  # else the client wants the whole file where it has changed
            await _unsatisfiable(self.num_bytes)(scope, receive, send)
            return
        others = [(name, value) for name, value in scope["headers"] if name != b"range"]
        wanted = [(b"range", f"bytes={','.join(ranges)}".encode())] if ranges else []
        await super().__call__({**scope, "headers": others + wanted}, receive, send)


def _ranges(asked: str, num_bytes: int) -> list[str] | None:
    """Return those ranges of a Range header that such a file has something of; None: the header is none of ours."""
    unit, _, text = asked.partition("=")
    if unit.strip().lower() != "bytes":
        return None
    ranges = []
    for each in (_RANGE.fullmatch(part.strip()) for part in text.split(",")):
        if each is None or each[0] == "-" or (each[1] and each[2] and int(each[2]) < int(each[1])):
            return None
        if int(each[1]) < num_bytes if each[1] else int(each[2]) > 0:
            ranges.append(each[0])
    return ranges


def _unsatisfiable(num_bytes: int) -> Response:
    text = f"Range: the file has {num_bytes} bytes"
    failure = failure_of(RequestError(text, code="range_not_satisfiable", status=416))
    return failure_response(replace(failure, more_headers=((b"content-range", b"bytes */%d" % num_bytes),)))
