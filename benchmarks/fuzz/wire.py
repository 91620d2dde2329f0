"""Attacks on the router's HTTP reader: few bytes of content in many bytes of framing, from 20 connections at once.

Every connection sends as fast as it is read, and is opened again when the server closes it.
"""

from __future__ import annotations

import asyncio
import json
import socket

from kvferry.benchmarks.fuzz.strike import Attack, Strike
from kvferry.benchmarks.fuzz.target import API_KEY

NUM_CONNECTIONS = 20
_BLOCK_BYTES = 64 * 2**10
_BODY = json.dumps({"prompt": "hi", "max_tokens": 2}).encode()
_START = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
_KEY = f"authorization: Bearer {API_KEY}\r\n".encode()
_CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
_END = b"%x\r\n%b\r\n0\r\n" % (len(_BODY), _BODY)


def _block(unit: bytes) -> bytes:
    return unit * (_BLOCK_BYTES // len(unit))


async def _pour(strike: Strike, opening: bytes, block: bytes) -> None:
    """`opening`, then `block` without end."""

    async def one() -> None:
        loop = asyncio.get_running_loop()
        while not strike.is_over:
            sock = socket.socket()
            sock.setblocking(False)
            try:
                await loop.sock_connect(sock, (strike.address.host, strike.address.port))
                await loop.sock_sendall(sock, opening)
                strike.outcomes["opened"] += 1
                while not strike.is_over:
                    await loop.sock_sendall(sock, block)
                    strike.outcomes["blocks"] += 1
            except OSError:
                strike.outcomes["closed by the server"] += 1
            finally:
                sock.close()

    await asyncio.gather(*(one() for _ in range(NUM_CONNECTIONS)))


async def trailers_without_end(strike: Strike) -> None:
    await _pour(strike, _START + _KEY + _CHUNKED + _END, _block(b"a:b\r\n"))


async def trailers_without_end_or_key(strike: Strike) -> None:
    await _pour(strike, _START + _CHUNKED + _END, _block(b"a:b\r\n"))


async def one_trailer_without_end(strike: Strike) -> None:
    await _pour(strike, _START + _KEY + _CHUNKED + _END + b"a: ", _block(b"b"))


async def chunks_of_one_byte(strike: Strike) -> None:
    await _pour(strike, _START + _KEY + _CHUNKED, _block(b"1\r\n \r\n"))


async def chunks_of_one_byte_without_a_key(strike: Strike) -> None:
    await _pour(strike, _START + _CHUNKED, _block(b"1\r\n \r\n"))


async def chunks_of_eight_bytes(strike: Strike) -> None:
    """As small as they may be."""
    await _pour(strike, _START + _KEY + _CHUNKED, _block(b"8\r\n        \r\n"))


async def a_chunk_extension_without_end(strike: Strike) -> None:
    await _pour(strike, _START + _KEY + _CHUNKED + b"1;", _block(b"a"))


async def heads_of_many_fields(strike: Strike) -> None:
    head = b"GET /live HTTP/1.1\r\nhost: localhost\r\n" + b"a:b\r\n" * 250 + b"\r\n"
    await _pour(strike, b"", head * (_BLOCK_BYTES // len(head)))


WIRE_ATTACKS: dict[str, Attack] = {
    attack.__name__.replace("_", " "): attack
    for attack in (
        trailers_without_end,
        trailers_without_end_or_key,
        one_trailer_without_end,
        chunks_of_one_byte,
        chunks_of_one_byte_without_a_key,
        chunks_of_eight_bytes,
        a_chunk_extension_without_end,
        heads_of_many_fields,
    )
}
