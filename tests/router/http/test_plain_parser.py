"""Requests that ask for another protocol and have a body, as Java's HttpClient and `curl --http2` send them."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvferry.router.api.body import read_body
from kvferry.router.http.leaving import Connection

from ..fakes import Script, Served, listening, serve

H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"
SOCKET = b"Connection: keep-alive, upgrade\r\nUpgrade: websocket\r\n"
START = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"prompt": "hi", "max_tokens": 2}).encode()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"5\r\n" + BODY[:5] + b"\r\n%x;a=b\r\n" % len(BODY[5:]) + BODY[5:] + b"\r\n0\r\nX-Trailer: a\r\n\r\n"
REQUESTS = {
    "h2c, a length": START + H2C + LENGTH + b"\r\n" + BODY,
    "h2c, chunks": START + CHUNKED + H2C + b"\r\n" + CHUNKS,
    "a web socket, a length": START + LENGTH + SOCKET + b"\r\n" + BODY,
}


class _Counting(Connection):
    """Tells what happens to it."""

    made: asyncio.Queue[_Counting]
    num_received = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.has_received, self.is_lost = asyncio.Event(), asyncio.Event()
        self.made.put_nowait(self)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.num_received += len(data)
        self.has_received.set()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.is_lost.set()


class _Client:
    """One connection, whose segments are received one by one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, server: _Counting) -> None:
        self.reader, self.writer, self.server = reader, writer, server

    async def send(self, *segments: bytes) -> None:
        for segment in segments:
            num_received = self.server.num_received + len(segment)
            self.writer.write(segment)
            async with asyncio.timeout(30):
                while self.server.num_received < num_received:
                    await self.server.has_received.wait()
                    self.server.has_received.clear()

    async def answer(self) -> tuple[bytes, bytes]:
        """Head and body of an answer of known length."""
        async with asyncio.timeout(30):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            return head, await self.reader.readexactly(length)


@asynccontextmanager
async def _connected(served: Served) -> AsyncIterator[_Client]:
    _Counting.made = asyncio.Queue()
    async with listening(served.app, _Counting) as address:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            yield _Client(reader, writer, await _Counting.made.get())
        finally:
            writer.close()


def _served() -> Served:
    return serve(Script("ab"))


def _text(body: bytes) -> object:
    return json.loads(body)["choices"][0]["text"]


@pytest.mark.parametrize("name", REQUESTS)
async def test_it_is_served_wherever_it_is_cut_and_the_connection_goes_on(name: str) -> None:
    request = REQUESTS[name]
    async with _connected(served := _served()) as client:
        for at in range(len(request)):
            await client.send(*filter(None, (request[:at], request[at:])))
            head, body = await client.answer()
            assert head.startswith(b"HTTP/1.1 200 ") and b"connection: close" not in head and _text(body) == "ab"
    assert len(served.dispatcher.requests) == len(request)
    assert {bytes(each.prompt_token_ids) for each in served.dispatcher.requests} == {b"hi"}


@pytest.mark.parametrize("name", REQUESTS)
async def test_it_is_served_byte_by_byte(name: str) -> None:
    async with _connected(_served()) as client:
        await client.send(*(bytes([byte]) for byte in REQUESTS[name]))
        assert _text((await client.answer())[1]) == "ab"
        await client.send(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert json.loads((await client.answer())[1]) == {"status": "live"}


async def test_a_body_of_many_reads_is_whole() -> None:
    text = "x" * 400_000
    body = json.dumps({"prompt": "hi", "max_tokens": 2, "user": text}).encode()
    head = START + H2C + b"Content-Length: %d\r\n\r\n" % len(body)
    async with _connected(_served()) as client:
        for segments in ((head, body), (head + body[:5000], body[5000:])):
            await client.send(*segments)
            assert _text((await client.answer())[1]) == "ab"


async def test_it_may_wait_to_be_told_to_go_on() -> None:
    async with _connected(_served()) as client:
        await client.send(START + H2C + LENGTH + b"Expect: 100-continue\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(BODY)
        assert _text((await client.answer())[1]) == "ab"


async def test_connections_are_closed_as_they_are_asked_to_be() -> None:
    request = START + H2C.replace(b"Upgrade,", b"Upgrade, close,") + LENGTH + b"\r\n" + BODY
    async with _connected(_served()) as client:
        await client.send(request)
        head, body = await client.answer()
        assert b"connection: close" in head and _text(body) == "ab" and await client.reader.read() == b""


@pytest.mark.parametrize("asked", [H2C, SOCKET])
async def test_without_a_body_the_connection_ends_with_the_answer(asked: bytes) -> None:
    async with _connected(_served()) as client:
        await client.send(b"GET /live HTTP/1.1\r\nHost: x\r\n" + asked + b"\r\nPRI * HTTP/2.0\r\n\r\n")
        head, body = await client.answer()
        assert b"connection: close" in head and json.loads(body) == {"status": "live"}
        assert await client.reader.read() == b""


REFUSED = {
    "two lengths": (LENGTH + b"Content-Length: 5\r\n\r\n" + BODY, 400),
    "a length and chunks": (LENGTH + CHUNKED + b"\r\n" + CHUNKS, 400),
    "an unknown coding": (b"Transfer-Encoding: xchunked\r\n\r\n" + BODY, 400),
    "no chunk": (CHUNKED + b"\r\nxyz\r\n", 400),
    "too long a body": (b"Content-Length: 40000000\r\n\r\n" + BODY, 413),
    "too much framing": (CHUNKED + b"\r\n" + b"1;%b\r\na\r\n" % (b"x" * 4000) * 40, 400),
    "too long a head": (LENGTH + b"X-A: " + b"a" * 140_000 + b"\r\n\r\n" + BODY, 431),
    "too many fields": (LENGTH + b"X-A: a\r\n" * 300 + b"\r\n" + BODY, 431),
    "too many of that field": (LENGTH + b"Upgrade: h2c\r\n" * 300 + b"\r\n" + BODY, 431),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_its_bounds_are_those_of_any_request(name: str) -> None:
    rest, status = REFUSED[name]
    async with _connected(served := _served()) as client:
        client.writer.write(START + H2C + rest)
        head, body = await client.answer()
    assert int(head.split()[1]) == status and json.loads(body)["error"]["message"]
    assert served.dispatcher.requests == []


async def test_a_second_request_behind_one_that_is_not_answered_is_dropped() -> None:
    request = REQUESTS["h2c, a length"]
    async with _connected(served := _served()) as client:
        await client.send(request * 2)
        head, _ = await client.answer()
        assert b"connection: close" in head and await client.reader.read() == b""
    assert len(served.dispatcher.requests) == 1


async def test_a_body_that_does_not_come_is_waited_for_as_long_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_body.__kwdefaults__ is not None
    monkeypatch.setitem(read_body.__kwdefaults__, "timeout_s", 0.05)
    async with _connected(_served()) as client:
        await client.send(START + H2C + LENGTH + b"\r\n" + BODY[:5])
        assert (await client.answer())[0].startswith(b"HTTP/1.1 408 ")


async def test_a_head_that_is_not_whole_in_time_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Counting, "head_limit_s", 0.05)
    async with _connected(served := _served()) as client:
        await client.send(START + H2C + LENGTH)
        async with asyncio.timeout(30):
            assert await client.reader.read() == b""
    assert served.dispatcher.requests == []


async def test_a_connection_that_ended_leaves_nothing_for_the_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        async with _connected(_served()) as client:
            await client.send(REQUESTS["h2c, a length"])
            await client.answer()
            parser = weakref.ref(client.server.parser)
            client.writer.close()
            async with asyncio.timeout(30):
                await client.server.is_lost.wait()
            assert parser() is None
    finally:
        gc.enable()
