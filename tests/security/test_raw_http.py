"""Requests as bytes on a socket, malformed, odd or fine: each has one right answer."""

from __future__ import annotations

import asyncio
import json

import pytest

from ..router.fakes import Script, listening, serve

KEY = "raw-key"
BODY = json.dumps({"prompt": "hi", "max_tokens": 2}).encode()
START = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
AUTH = b"Authorization: Bearer raw-key\r\n"
HEAD = START + AUTH
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
ONE_CHUNK = b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"
TAIL = b"\r\n" + BODY
GOOD = HEAD + LENGTH + TAIL
LIVE = b"GET /live HTTP/1.1\r\nHost: x\r\n"

CASES = {
    "fine": (GOOD, 200),
    "in a chunk": (HEAD + CHUNKED + b"\r\n" + ONE_CHUNK, 200),
    "two at once": (GOOD * 2, 200),
    "the same length twice": (HEAD + LENGTH + LENGTH + TAIL, 400),
    "two lengths": (HEAD + LENGTH + b"Content-Length: 5\r\n" + TAIL, 400),
    "a length and chunks": (HEAD + LENGTH + CHUNKED + b"\r\n" + ONE_CHUNK, 400),
    "chunks and a length": (HEAD + CHUNKED + LENGTH + TAIL, 400),
    "the coding identity": (HEAD + b"Transfer-Encoding: identity\r\n" + LENGTH + TAIL, 400),
    "an unknown coding": (HEAD + b"Transfer-Encoding: xchunked\r\n" + TAIL, 400),
    "a space before the colon": (HEAD + b"Transfer-Encoding : chunked\r\n" + LENGTH + TAIL, 400),
    "a negative length": (HEAD + b"Content-Length: -5\r\n" + TAIL, 400),
    "a length with a sign": (HEAD + b"Content-Length: +%d\r\n" % len(BODY) + TAIL, 400),
    "a length of 23 digits": (HEAD + b"Content-Length: " + b"9" * 23 + b"\r\n" + TAIL, 400),
    "a length of 40 MB": (HEAD + b"Content-Length: 40000000\r\n" + TAIL, 413),
    "line feeds alone": (GOOD.replace(b"\r\n", b"\n"), 400),
    "a folded field": (HEAD + b"X-A: b\r\n c\r\n" + LENGTH + TAIL, 400),
    "a zero byte": (HEAD + b"X-A: b\x00c\r\n" + LENGTH + TAIL, 400),
    "a chunk of 2**68 bytes": (HEAD + CHUNKED + b"\r\nFFFFFFFFFFFFFFFFF\r\n{}\r\n0\r\n\r\n", 400),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "a hello of TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200, 400),
    "CONNECT": (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n" + AUTH + b"\r\n", 400),
    "a head of 60 KB": (HEAD + b"X-B: " + b"a" * 60_000 + b"\r\n" + LENGTH + TAIL, 200),
    "a head of 140 KB": (HEAD + b"X-B: " + b"a" * 140_000 + b"\r\n" + LENGTH + TAIL, 431),
    "no key": (START + LENGTH + TAIL, 401),
    "a wrong key": (START + AUTH.replace(b"raw-key", b"raw-keyx") + LENGTH + TAIL, 401),
    "a password": (START + b"Authorization: Basic cmF3LWtleQ==\r\n" + LENGTH + TAIL, 401),
    "two keys": (START + b"Authorization: Bearer wrong\r\n" + AUTH + LENGTH + TAIL, 400),
    "the same key twice": (HEAD + AUTH + LENGTH + TAIL, 400),
    "no host": (GOOD.replace(b"Host: x\r\n", b""), 400),
    "no host, as before 1.1": (GOOD.replace(b"Host: x\r\n", b"").replace(b"HTTP/1.1", b"HTTP/1.0"), 200),
    "two hosts": (HEAD + b"Host: y\r\n" + LENGTH + TAIL, 400),
    "a packed body": (HEAD + b"Content-Encoding: gzip\r\n" + LENGTH + TAIL, 415),
    "a body that is packed twice": (HEAD + b"Content-Encoding: gzip, br\r\n" + LENGTH + TAIL, 415),
    "a body that is not packed": (HEAD + b"Content-Encoding: identity\r\n" + LENGTH + TAIL, 200),
    "two types": (HEAD + b"Content-Type: application/json\r\n" + LENGTH + TAIL, 400),
    "version 2.0": (GOOD.replace(b"HTTP/1.1", b"HTTP/2.0"), 505),
    "version 0.9": (GOOD.replace(b"HTTP/1.1", b"HTTP/0.9"), 505),
    "version 1.0": (GOOD.replace(b"HTTP/1.1", b"HTTP/1.0"), 200),
    "an id with escapes": (HEAD + b'X-Request-Id: a\tb"}{evil\r\n' + LENGTH + TAIL, 200),
    "a web socket": (LIVE + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n", 200),
}


async def _ask(data: bytes) -> tuple[int, bytes]:
    """The first answer's status, and all that came; the server ends the connection, or we do when it says no more."""
    served = serve(Script("ab"), api_keys=(KEY,), allowed_hosts=())
    async with listening(served.app) as address:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
        body = await reader.readexactly(length)
        writer.close()
    return int(head.split()[1]), body


@pytest.mark.parametrize("name", CASES)
async def test_bytes_on_a_socket_have_one_right_answer(name: str) -> None:
    data, expected = CASES[name]
    status, body = await _ask(data)
    assert status == expected, body
    if status >= 400:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


async def test_what_is_not_spoken_here_ends_the_connection() -> None:
    served = serve(Script("ab"), api_keys=(KEY,))
    async with listening(served.app) as address:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(GOOD.replace(b"HTTP/1.1", b"HTTP/2.0"))
        assert b"connection: close\r\n" in await reader.read()
        writer.close()
    assert served.dispatcher.requests == []
