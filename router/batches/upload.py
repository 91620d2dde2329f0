"""An uploaded file: a multipart body that goes to disk as it comes, and is never whole in memory.

received ─ WRITE_BYTES at a time, on a thread ─> multipart parser ─> the part `file` ─> disk
                                                        └─────────> small fields, bounded
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import Receive

from ...common.errors import RequestError
from ..api.body import ClientGone, check_codings
from ..state.errors import clip
from .files import INPUT
from .folder import DataFolder, Room, no_room, sync

MAX_FILE_BYTES = 512 * 2**20  # OpenAI's limit for any file; of batches 200 MB
WRITE_BYTES = 512 * 2**10  # parsed and written in one go: larger ones need more memory, smaller ones more threads
SILENCE_S = 30.0  # between two pieces of a body
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_MAX_FIELD_BYTES = 1024
_MAX_PARTS = 16
_MAX_NAME_CHARS = 255
_MAX_FRAMING_BYTES = 64 * 2**10  # of the body, beside the file
_WRITTEN_BY_BROWSERS = {b"%22": b'"', b"%0A": b"\n", b"%0D": b"\r"}  # in names of files; HTML escapes no others
_NOT_IN_A_NAME = re.compile(r"[\x00-\x1f\x7f]|[\ud800-\udfff]")

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # what clients send is not worth a line


class Form:
    """A form as it comes: its file goes to `file`, its other fields to `fields`."""

    def __init__(self, boundary: bytes, file: BinaryIO, max_bytes: int) -> None:
        self.fields: dict[str, bytes] = {}
        self.filename: str | None = None  # None: no file has come
        self.is_whole = False
        self.num_bytes = 0  # of the file
        self._file = file
        self._max_bytes = max_bytes
        self._num_parts = 0
        self._name = ""
        self._header = self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
                "on_end": self._on_end,
            },
        )

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body. Raises RequestError for what is no form of ours."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise RequestError(f"this is no multipart form: {clip(str(error), 128)}", code="invalid_form") from None

    def _on_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise RequestError(f"the form has more than {_MAX_PARTS} parts", code="invalid_form")
        self._headers, self._header, self._value = {}, b"", b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header, self._value = b"", b""

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name == "file":
            if self.filename is not None:
                raise RequestError("the form has more than one file", param="file")
            self.filename = _harmless(options.get(b"filename", b""))
        elif self._name in _FIELDS and self._name not in self.fields:
            self.fields[self._name] = b""
        else:
            known = ", ".join(("file", *_FIELDS))
            raise RequestError(f"the form has a field {clip(self._name)}; known, once each: {known}", param=self._name)

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self.num_bytes += end - start
            if self.num_bytes > self._max_bytes:
                raise too_large(self._max_bytes)
            self._file.write(memoryview(data)[start:end])
        else:
            self.fields[self._name] += data[start:end]
            if len(self.fields[self._name]) > _MAX_FIELD_BYTES:
                raise RequestError(f"{self._name}: longer than {_MAX_FIELD_BYTES} bytes", param=self._name)

    def _on_end(self) -> None:
        self.is_whole = True

    def check(self) -> float | None:
        """Check the whole form; returns for how many seconds the client wants the file kept, if it says so."""
        if not self.is_whole:
            raise RequestError("the form ends in its middle", code="invalid_form")
        if self.filename is None:
            raise RequestError("file: the form has no such part", param="file")
        purpose = self.fields.get("purpose", b"").decode("utf-8", "replace")
        if purpose != INPUT:
            raise RequestError(f"purpose: {clip(purpose)} is not served here, only 'batch' is", param="purpose")
        anchor, seconds = (self.fields.get(f"expires_after[{key}]") for key in ("anchor", "seconds"))
        if anchor is None and seconds is None:
            return None
        if anchor != b"created_at" or seconds is None or not re.fullmatch(rb"[0-9]{1,9}", seconds) or not int(seconds):
            raise RequestError(
                "expires_after: needs anchor 'created_at' and a whole number of seconds", param="expires_after"
            )
        return float(seconds)


def _harmless(name: bytes) -> str:
    """Return a file's name without its folders, and without what no line may have."""
    for written, meant in _WRITTEN_BY_BROWSERS.items():
        name = name.replace(written, meant)
    last = name.decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2]
    return _NOT_IN_A_NAME.sub("", last)[:_MAX_NAME_CHARS] or "file"


def too_large(max_bytes: int) -> RequestError:
    return RequestError(f"the file has more than {max_bytes} bytes", code="request_too_large", status=413)


def boundary_of(headers: Mapping[bytes, bytes]) -> bytes:
    """Return the boundary of a multipart body. Raises RequestError (415, 501) for another kind of body."""
    check_codings(headers)  # what is stored is what is read
    kind, options = parse_options_header(headers.get(b"content-type", b""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 200:
        raise RequestError(
            "the body must have Content-Type: multipart/form-data, with a boundary",
            code="unsupported_media_type",
            status=415,
        )
    return boundary


@contextlib.asynccontextmanager
async def received(
    headers: Mapping[bytes, bytes], receive: Receive, folder: DataFolder
) -> AsyncIterator[tuple[Form, Path]]:
    """Yield an upload that is whole, and the part that holds its file: whoever wants it renames it."""
    boundary = boundary_of(headers)
    incoming = _Incoming(folder)
    limit = min(MAX_FILE_BYTES, await asyncio.to_thread(incoming.measure))
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit + _MAX_FRAMING_BYTES:
        raise too_large(MAX_FILE_BYTES) if limit == MAX_FILE_BYTES else no_room(folder.max_bytes)
    part = folder.new_part()
    try:
        with part.open("wb") as file:
            form = Form(boundary, file, MAX_FILE_BYTES)
            await _receive(receive, form, incoming)
            await asyncio.to_thread(sync, file)
        yield form, part
        incoming.is_kept = True
    finally:
        incoming.end()
        await asyncio.to_thread(part.unlink, missing_ok=True)


class _Incoming:
    """The bytes of one upload, which share the folder's room with all others that come meanwhile."""

    def __init__(self, folder: DataFolder) -> None:
        self.num_bytes = 0
        self.is_kept = False
        self._folder = folder
        self._room = Room(folder)

    def measure(self) -> int:
        """Return how many bytes may still be added. Waits for the disk."""
        self._room.measure()
        return max(0, self._room.num_bytes)

    def add(self, num_bytes: int) -> None:
        """Count what has come. Raises RequestError (507) where it, and what others have brought, fill the room."""
        self.num_bytes += num_bytes
        self._folder.num_incoming += num_bytes
        self._folder.num_arrived += num_bytes
        if self._room.num_bytes < 0:
            raise no_room(self._folder.max_bytes)

    def end(self) -> None:
        """Count it no longer: it is a file of the folder now, or gone."""
        self._folder.num_incoming -= self.num_bytes
        if not self.is_kept:
            self._folder.num_arrived -= self.num_bytes


async def _receive(receive: Receive, form: Form, incoming: _Incoming) -> None:
    held = bytearray()
    while True:
        piece, has_more = await _next(receive)
        held += piece
        incoming.add(len(piece))
        if len(held) >= WRITE_BYTES or not has_more:
            await asyncio.to_thread(form.feed, bytes(held))
            held.clear()
        if not has_more:
            return
        if incoming.num_bytes > form.num_bytes + len(held) + _MAX_FRAMING_BYTES:
            raise RequestError("the form has more around its file than in it", code="invalid_form")


async def _next(receive: Receive) -> tuple[bytes, bool]:
    try:
        async with asyncio.timeout(SILENCE_S):
            message = await receive()
    except TimeoutError:
        text = f"nothing came of the request's body for {SILENCE_S:g} s"
        raise RequestError(text, code="request_timeout", status=408) from None
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)
