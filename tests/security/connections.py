"""The application behind a real socket, and clients that speak bytes."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from kvferry.router.http.connection_limits import Connections
from kvferry.router.http.http_server import HttpServer
from kvferry.router.http.protocol import DeadlineProtocol
from kvferry.router.http.tls_listener import Certificates
from kvferry.settings.sockets import listen
from kvferry.wire.address import Address

from ..router.fakes import Served

LIMIT_S = 30.0
GET = b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def listening(
    served: Served,
    *,
    total: int = 100,
    per_address: int = 100,
    protocol: type[DeadlineProtocol] = DeadlineProtocol,
    certificates: Certificates | None = None,
) -> AsyncIterator[tuple[str, int]]:
    sock = listen(Address("127.0.0.1", 0))
    books = Connections(total, per_address, served.metrics)
    server = HttpServer(served.app, protocol=protocol, books=books, certificates=certificates)
    async with server.serving(sock):
        yield sock.getsockname()


@asynccontextmanager
async def connected(
    address: tuple[str, int], local: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection(*address, local_addr=(local, 0), ssl=tls)
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of an answer of known length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
    return head, await reader.readexactly(length)


def post(path: str = "/v1/completions", **fields: object) -> bytes:
    body = json.dumps({"prompt": "hi", **fields}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def count(served: Served, name: str) -> float:
    """A counter's value, over all of its labels."""
    text = served.metrics.scrape([("toy", served.dispatcher.pools)], num_in_flight=0)()[0].decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


async def comes(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110  # what is waited for tells nobody
            await asyncio.sleep(0.01)
