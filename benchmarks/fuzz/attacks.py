"""Attacks on the real router, one by one, while /live is polled from outside.

Each is a coroutine that goes on for as long as it is told. It counts what it was answered; what no correct server
answers is a failure. Slow ones hold their connections with a byte a second; loud ones send as fast as a few clients
can.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import socket
import struct
from collections.abc import Callable, Iterator

from kvferry.benchmarks.fuzz.raw_http import NoAnswer, RawClient, get, post, read_answer
from kvferry.benchmarks.fuzz.strike import Attack, Strike
from kvferry.benchmarks.fuzz.target import API_KEY
from kvferry.benchmarks.fuzz.templates import TEMPLATE_ATTACKS
from kvferry.benchmarks.fuzz.wire import WIRE_ATTACKS

NUM_LOUD = 4
_CHAT_PATH = "/v1/chat/completions"
_PROMPT_PATH = "/v1/completions"
_TRICKLE_S = 1.0
_AUTH = f"authorization: Bearer {API_KEY}\r\n".encode()
_HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n" + _AUTH + b"content-type: application/json\r\n"


# --- slow ones: many sockets that do almost nothing ---------------------------------------------------------


async def _hold(strike: Strike, opening: bytes, trickle: bytes, receive_bytes: int | None = None) -> None:
    """Sockets that say `opening`, then `trickle` every second, and are opened again when they are closed."""

    async def one() -> None:
        while not strike.is_over:
            sock = socket.socket()
            sock.setblocking(False)
            if receive_bytes is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            loop = asyncio.get_running_loop()
            try:
                await loop.sock_connect(sock, (strike.address.host, strike.address.port))
                await loop.sock_sendall(sock, opening)
                strike.outcomes["opened"] += 1
                while not strike.is_over:
                    await asyncio.sleep(_TRICKLE_S)
                    await loop.sock_sendall(sock, trickle)
            except OSError:
                strike.outcomes["closed by the server"] += 1
            finally:
                sock.close()

    await asyncio.gather(*(one() for _ in range(strike.num_sockets)))


async def slow_heads(strike: Strike) -> None:
    await _hold(strike, b"GET /live HTTP/1.1\r\nx-slow: ", b"a")


async def slow_bodies(strike: Strike) -> None:
    await _hold(strike, _HEAD + b"content-length: 100000\r\n\r\n{", b" ")


async def slow_bodies_without_a_key(strike: Strike) -> None:
    await _hold(strike, _HEAD.replace(_AUTH, b"") + b"content-length: 100000\r\n\r\n{", b" ")


async def idle_connections(strike: Strike) -> None:
    await _hold(strike, b"", b"\r\n")


async def readers_that_stop(strike: Strike) -> None:
    body = {"prompt": "a", "stream": True, "max_tokens": 1000, "ignore_eos": True, "logprobs": 20}
    few = Strike(strike.address, min(strike.num_sockets, 40), strike.duration_s, strike.outcomes, strike.failures)
    few.begin()
    await _hold(few, post(_PROMPT_PATH, json.dumps(body).encode()), b"", receive_bytes=2048)


# --- loud ones: a few clients as fast as they can -----------------------------------------------------------


async def _shout(strike: Strike, requests: Callable[[int], Iterator[bytes]], num_clients: int = NUM_LOUD) -> None:
    async def one(index: int) -> None:
        client = RawClient(strike.address)
        for request in requests(index):
            if strike.is_over:
                break
            try:
                strike.note(await client.ask(request))
            except NoAnswer:
                strike.outcomes["no answer"] += 1
        client.close()

    await asyncio.gather(*map(one, range(num_clients)))


def _again(request: bytes) -> Callable[[int], Iterator[bytes]]:
    return lambda index: itertools.repeat(request)


def _json(**fields: object) -> bytes:
    return json.dumps(fields).encode()


async def prompts_of_8_mb(strike: Strike) -> None:
    await _shout(strike, _again(post(_PROMPT_PATH, _json(prompt="Lorem ipsum " * 700_000))))


async def chats_of_8_mb(strike: Strike) -> None:
    messages = [{"role": "user", "content": "Lorem ipsum " * 170} for _ in range(4000)]
    await _shout(strike, _again(post(_CHAT_PATH, _json(messages=messages))))


async def escapes_of_8_mb(strike: Strike) -> None:
    body = b'{"prompt": "' + b"\\u00e4\\n" * 1_000_000 + b'"}'
    await _shout(strike, _again(post(_PROMPT_PATH, body)))


async def half_a_million_ids(strike: Strike) -> None:
    await _shout(strike, _again(post(_PROMPT_PATH, b'{"prompt": [' + b"7," * 499_000 + b"7]}")))


async def half_a_million_parts(strike: Strike) -> None:
    parts = b",".join([b'{"type":"text","text":""}'] * 240_000)
    await _shout(strike, _again(post(_CHAT_PATH, b'{"messages":[{"role":"user","content":[' + parts + b"]}]}")))


async def wrong_types_of_10_mb(strike: Strike) -> None:
    big = b"[" + b"{}," * 400_000 + b"{}]"
    bodies = [b'{"prompt":"a","%s":%s}' % (name, big) for name in (b"n", b"stop", b"seed", b"metadata", b"messages")]
    await _shout(strike, lambda index: itertools.cycle([post(_PROMPT_PATH, body) for body in bodies]))


async def half_a_surrogate_at_the_end(strike: Strike) -> None:
    body = b'{"prompt": ["' + b'a","' * 400_000 + b'\\ud800"]}'
    await _shout(strike, _again(post(_PROMPT_PATH, body)))


async def deep_json(strike: Strike) -> None:
    depths = [b'{"a":' * 100_000, b"[" * 1_000_000, b'{"prompt":' + b"[" * 30 + b"]" * 30 + b"}"]
    await _shout(strike, lambda index: itertools.cycle([post(_PROMPT_PATH, body) for body in depths]))


async def bodies_over_the_limit(strike: Strike) -> None:
    """33 MB that say so, and as much that does not."""

    async def chunked() -> None:
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        while not strike.is_over:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection(strike.address.host, strike.address.port)
                writer.write(_HEAD + b"transfer-encoding: chunked\r\n\r\n")
                answer = asyncio.create_task(read_answer(reader))
                while not answer.done() and not strike.is_over:
                    writer.write(chunk)
                    await writer.drain()
                if answer.done():
                    strike.note(answer.result())
                answer.cancel()
                writer.transport.abort()

    whole = post(_PROMPT_PATH, b" " * 33_000_000)
    await asyncio.gather(_shout(strike, _again(whole), 2), chunked(), chunked())


async def extreme_knobs(strike: Strike) -> None:
    knobs: list[dict[str, object]] = [
        {"n": 16384}, {"n": 16, "max_tokens": 10**9}, {"best_of": 10**6}, {"logprobs": 10**6}, {"stop": ["x"] * 10_000},
        {"stop": "x" * 10**6}, {"logit_bias": {str(i): 1 for i in range(10_000)}}, {"min_tokens": 10**9},
        {"n": 16, "logprobs": 20, "max_tokens": 100, "ignore_eos": True}, {"prompt": ["a"] * 256, "n": 16},
    ]  # fmt: skip
    await _shout(
        strike, lambda index: itertools.cycle([post(_PROMPT_PATH, _json(**({"prompt": "a"} | k))) for k in knobs])
    )


async def labels_without_end(strike: Strike) -> None:
    def requests(index: int) -> Iterator[bytes]:
        for number in itertools.count():
            name = f"{index}-{number}"
            yield get(f"/metrics/{name}")
            yield get("/live", method=random.choice(("BREW", "PROPFIND", "SEARCH", "LINK")))
            yield post(_PROMPT_PATH, _json(prompt="a", model=name))
            yield post(_PROMPT_PATH, _json(prompt="a", max_tokens=1, user=name), more=f"x-request-id: {name}\r\n")

    await _shout(strike, requests)


async def wrong_keys(strike: Strike) -> None:
    def requests(index: int) -> Iterator[bytes]:
        for number in itertools.count():
            yield post(_PROMPT_PATH, b"{}", key=f"{API_KEY}{index}{number}")
            yield get("/v1/models", key=None)

    await _shout(strike, requests)


async def connections_without_end(strike: Strike) -> None:
    """Opened, half of them used, and dropped with a reset."""

    async def one() -> None:
        while not strike.is_over:
            try:
                _, writer = await asyncio.open_connection(strike.address.host, strike.address.port)
            except OSError:
                strike.outcomes["refused"] += 1
                continue
            strike.outcomes["opened"] += 1
            writer.write(random.choice((b"", get("/live"), b"\x16\x03\x01\x02", get("/live") * 100)))
            _reset(writer)
            await asyncio.sleep(0)

    await asyncio.gather(*(one() for _ in range(NUM_LOUD)))


async def clients_that_leave(strike: Strike) -> None:
    """Requests that are reset at a random moment."""

    async def one(seed: int) -> None:
        rng = random.Random(seed)
        while not strike.is_over:
            body = _json(prompt="hello " * 20, stream=rng.random() < 0.5, max_tokens=200, ignore_eos=True)
            request = post(_PROMPT_PATH, body)
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(strike.address.host, strike.address.port)
                writer.write(request[: rng.randrange(len(request))] if rng.random() < 0.3 else request)
                await asyncio.sleep(rng.random() * 0.02)
                strike.outcomes["left"] += 1
                _reset(writer)

    await asyncio.gather(*map(one, range(NUM_LOUD * 2)))


async def requests_in_a_row_without_waiting(strike: Strike) -> None:
    async def one() -> None:
        while not strike.is_over:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection(strike.address.host, strike.address.port)
                writer.write(post(_PROMPT_PATH, _json(prompt="a", stream=True)) * 1000)
                strike.note(await read_answer(reader))
                writer.transport.abort()

    await asyncio.gather(*(one() for _ in range(NUM_LOUD)))


async def heads_that_are_no_http(strike: Strike) -> None:
    rng = random.Random(7)
    heads = [
        rng.randbytes(200), b"GET / HTTP/9.9\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", _HEAD + b"content-length: -5\r\n\r\n",
        b"GET /live HTTP/1.1\r\n" + b"x-a: b\r\n" * 20_000 + b"\r\n", b"GET /" + b"a" * 100_000,
        _HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /live HTTP/1.1\r\nx: \x00\x01\r\n\r\n", b"GET /live HTTP/1.1\r\nx-request-id: \x1b[31m\xff\r\n\r\n",
    ]  # fmt: skip
    await _shout(strike, lambda index: itertools.cycle(heads))


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


ATTACKS: dict[str, Attack] = (
    {
        attack.__name__.replace("_", " "): attack
        for attack in (
            slow_heads,
            slow_bodies,
            slow_bodies_without_a_key,
            idle_connections,
            readers_that_stop,
            prompts_of_8_mb,
            chats_of_8_mb,
            escapes_of_8_mb,
            half_a_million_ids,
            half_a_million_parts,
            wrong_types_of_10_mb,
            half_a_surrogate_at_the_end,
            deep_json,
            bodies_over_the_limit,
            extreme_knobs,
            labels_without_end,
            wrong_keys,
            connections_without_end,
            clients_that_leave,
            requests_in_a_row_without_waiting,
            heads_that_are_no_http,
        )
    }
    | WIRE_ATTACKS
    | TEMPLATE_ATTACKS
)
