"""HTTP as attackers and fuzzers speak it: bytes on a socket, with an answer that is read to its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass

from kvferry.benchmarks.fuzz.target import API_KEY
from kvferry.wire.address import Address

_LIMIT_S = 60.0
_BUFFER_BYTES = 1 << 20


class NoAnswer(Exception):
    """The connection ended, or nothing came."""


@dataclass(slots=True, frozen=True)
class Answer:
    status: int
    body: bytes
    headers: bytes
    is_whole: bool = True  # a chunked body came to its end

    @property
    def fault(self) -> str | None:
        """Why no correct server answers so; None: it may."""
        if self.status >= 500:
            return f"status {self.status}: {self.body[:200]!r}"
        if not self.is_whole:
            return "the answer was cut"
        if self.status >= 400:
            with contextlib.suppress(ValueError):
                if set(json.loads(self.body)["error"]) == {"message", "type", "param", "code"}:
                    return None
            return f"status {self.status} without an error's shape: {self.body[:200]!r}"
        if self.body.startswith(b"data: ") and not self.body.endswith(b"data: [DONE]\n\n"):
            return f"a stream that ends in silence: {self.body[-200:]!r}"
        return None


def post(path: str, body: bytes, *, key: str | None = API_KEY, more: str = "") -> bytes:
    auth = f"authorization: Bearer {key}\r\n" if key is not None else ""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{auth}content-type: application/json\r\n{more}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def get(path: str, *, key: str | None = API_KEY, method: str = "GET") -> bytes:
    auth = f"authorization: Bearer {key}\r\n" if key is not None else ""
    return f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n{auth}\r\n".encode()


class RawClient:
    """One connection at a time, opened again when the server closed it."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> Answer:
        """Raises NoAnswer."""
        for is_fresh in (False, True) if self._writer is not None else (True,):
            try:
                return await asyncio.wait_for(self._ask(request), _LIMIT_S)
            except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError) as error:
                self.close()
                if is_fresh:
                    raise NoAnswer(repr(error)) from None
        raise AssertionError

    async def _ask(self, request: bytes) -> Answer:
        if self._reader is None or self._writer is None:
            host, port = self._address.host, self._address.port
            self._reader, self._writer = await asyncio.open_connection(host, port, limit=_BUFFER_BYTES)
        self._writer.write(request)
        with contextlib.suppress(ConnectionError):  # it may have answered already
            await self._writer.drain()
        answer = await read_answer(self._reader)
        if b"connection: close" in answer.headers:
            self.close()
        return answer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(head.split(b" ", 2)[1])
    if b"\r\ntransfer-encoding: chunked\r\n" in head:
        body, is_whole = await _read_chunks(reader)
        return Answer(status, body, head, is_whole)
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
    return Answer(status, await reader.readexactly(length), head)


async def _read_chunks(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    parts: list[bytes] = []
    try:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            parts.append((await reader.readexactly(size + 2))[:-2])
        await reader.readexactly(2)
    except (asyncio.IncompleteReadError, ConnectionError):
        return b"".join(parts), False
    return b"".join(parts), True
