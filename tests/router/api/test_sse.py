"""Answers over real sockets: clients that leave, clients that are slow, a server that stops."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvferry.router.catalogue.version import ServedModel
from kvferry.router.http.protocol import DeadlineProtocol

from ..fakes import Script, events, listening, serve

BODY = {"prompt": "hi", "stream": True, "max_tokens": 400}


def _post(body: dict[str, object], path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


@asynccontextmanager
async def _connected(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


def _body_of(answer: bytes) -> str:
    """A chunked answer's body."""
    _, _, rest = answer.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body.decode()


async def test_a_streams_first_token_arrives_while_the_rest_is_not_there() -> None:
    served = serve(Script("abcdef", hold_at=1))
    async with listening(served.app) as address, _connected(address) as (reader, writer):
        writer.write(_post(BODY))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"server-timing: " in head and b"x-request-id: " in head
        first = await reader.readuntil(b"\n\n")
        assert b'"text":"a"' in first
        served.dispatcher.go.set()
        rest = await reader.readuntil(b"[DONE]\n\n")
    assert rest.count(b"data: ") == 7  # five letters, the end, [DONE]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("hold_at", [0, 3])
async def test_a_client_that_leaves_aborts_its_request(stream: bool, hold_at: int) -> None:
    served = serve(Script("abcdef", hold_at=hold_at))
    async with listening(served.app) as address:
        async with _connected(address) as (_, writer):
            writer.write(_post({**BODY, "stream": stream}))
            await served.dispatcher.held.wait()
        await served.dispatcher.abort_seen.wait()
    assert served.dispatcher.aborted == [served.request.request_id]
    assert len(served.app.api.in_flight) == 0


async def test_a_client_that_leaves_aborts_every_prompt_of_a_batch() -> None:
    served = serve(Script("abcdef", hold_at=3))
    async with listening(served.app) as address:
        async with _connected(address) as (_, writer):
            writer.write(_post({**BODY, "prompt": ["a", "b", "c"]}))
            await served.dispatcher.held.wait()
        await served.dispatcher.abort_seen.wait()
    assert len(served.dispatcher.aborted) == 3


async def test_a_finished_answer_is_not_aborted() -> None:
    served = serve(Script("ab"))
    async with listening(served.app) as address, _connected(address) as (reader, writer):
        for _ in range(2):  # on one connection
            writer.write(_post(BODY))
            await reader.readuntil(b"[DONE]\n\n")
            await reader.readuntil(b"0\r\n\r\n")
    assert served.dispatcher.aborted == []


async def test_a_server_that_stops_tells_its_streams() -> None:
    served = serve(Script("abcdef", hold_at=3))
    async with listening(served.app) as address, _connected(address) as (reader, writer):
        writer.write(_post(BODY))
        await served.dispatcher.held.wait()
        head = await reader.readuntil(b"\r\n\r\n")
        served.app.api.in_flight.end_all()
        found = events(_body_of(head + await reader.readuntil(b"0\r\n\r\n")))
    assert [event for event in found if "error" in event] == found[-1:]
    assert found[-1]["error"]["code"] == "shutting_down"  # type: ignore[index]
    assert served.dispatcher.aborted == [served.request.request_id]


async def test_a_server_that_stops_answers_whole_calls_with_503() -> None:
    served = serve(Script("abcdef", hold_at=3))
    async with listening(served.app) as address, _connected(address) as (reader, writer):
        writer.write(_post({**BODY, "stream": False}))
        await served.dispatcher.held.wait()
        served.app.api.in_flight.end_all()
        head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in head


class _Impatient(DeadlineProtocol):
    head_limit_s = 0.05
    write_limit_s = 0.05


async def test_a_head_that_does_not_end_is_closed() -> None:
    async with listening(serve().app, _Impatient) as address, _connected(address) as (reader, writer):
        writer.write(b"GET /live HTTP/1.1\r\nx-slow: ")
        assert await reader.read() == b""


async def test_an_endless_head_is_refused_while_it_comes() -> None:
    async with listening(serve().app) as address, _connected(address) as (reader, writer):
        writer.write(b"GET /live HTTP/1.1\r\nx-long: " + b"x" * 70_000)
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 431 ")


async def test_a_connection_outlives_the_heads_limit_once_the_head_is_there() -> None:
    served = serve(Script("ab", hold_at=1))
    async with listening(served.app, _Impatient) as address, _connected(address) as (reader, writer):
        writer.write(_post(BODY))
        await reader.readuntil(b"\n\n")
        asyncio.get_running_loop().call_later(0.1, served.dispatcher.go.set)
        await reader.readuntil(b"[DONE]\n\n")


async def test_a_client_that_does_not_read_is_cut_and_its_request_aborted() -> None:
    script = Script("x" * 10_000, tokens_per_update=100, hold_at=99)
    served = serve(script, model=ServedModel("toy", 20_000, 260))
    async with listening(served.app, _Impatient) as address:
        host, _, port = address.rpartition(":")
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((host, int(port)))
            sock.sendall(_post({**BODY, "max_tokens": 10_000, "logprobs": 20}))
            await served.dispatcher.abort_seen.wait()
    assert served.dispatcher.aborted == [served.request.request_id]


async def test_what_is_not_http_is_refused_in_the_same_shape() -> None:
    async with listening(serve().app) as address, _connected(address) as (reader, writer):
        writer.write(b"\x16\x03\x01 hello\r\n\r\n")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_http"


async def test_a_body_that_is_too_large_is_refused_while_it_comes() -> None:
    async with listening(serve(max_body_bytes=1000).app) as address, _connected(address) as (reader, writer):
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n" + b"800\r\n" + b" " * 0x800 + b"\r\n"
        )
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")
