"""Bytes that carry nothing: they are bounded for each message, and parsed by turns."""

from __future__ import annotations

import asyncio
import json

import pytest

from kvferry.common.errors import RequestError
from kvferry.router.http.intake import MAX_FRAMING_BYTES, MAX_HEAD_BYTES, MAX_HEADERS, TURN_S, Intake, MessageBytes
from kvferry.tests.fake_clock import FakeClock

from ..router.fakes import Script, Served, serve
from .connections import connected, listening, read_answer

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n"


def _chunks(body: bytes, size: int) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n"


def _body(prompt: str = "hi") -> bytes:
    return json.dumps({"prompt": prompt, "max_tokens": 2}).encode()


async def _ask(served: Served, request: bytes) -> tuple[int, dict[str, object], bytes]:
    """Status, body and head of the answer."""
    async with listening(served) as address, connected(address) as (reader, writer):
        writer.write(request)
        head, body = await read_answer(reader)
    return int(head.split()[1]), json.loads(body), head


# --- trailers -----------------------------------------------------------------------------------------------


async def test_trailers_change_nothing() -> None:
    served = serve(Script("ab"), api_keys=("k",))
    trailers = b"authorization: Bearer k\r\nx-request-id: trailer\r\n\r\n"
    status, _, head = await _ask(served, HEAD + b"x-request-id: head\r\n\r\n" + _chunks(_body(), 100) + trailers)
    assert status == 401 and b"x-request-id: head\r\n" in head
    with_key = HEAD + b"authorization: Bearer k\r\n\r\n" + _chunks(_body(), 100)
    status, _, _ = await _ask(served, with_key + b"authorization: Bearer wrong\r\nx-request-class: none\r\n\r\n")
    assert status == 200 and len(served.dispatcher.requests) == 1


@pytest.mark.parametrize("trailers", [b"a:b\r\n" * (MAX_FRAMING_BYTES // 4), b"a: " + b"b" * 2 * MAX_FRAMING_BYTES])
async def test_trailers_without_end_end_the_request(trailers: bytes) -> None:
    served = serve(Script("ab"))
    status, body, head = await _ask(served, HEAD + b"\r\n" + _chunks(_body(), 100) + trailers)
    assert (status, body["error"]["code"]) == (400, "too_much_framing")  # type: ignore[index]
    assert b"connection: close" in head
    assert served.dispatcher.requests == [] and served.app.api.body_room.num_bytes == 0


# --- chunks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2])
async def test_a_body_of_tiny_chunks_is_refused_once_they_are_many(size: int) -> None:
    served = serve(Script("ab"))
    status, body, _ = await _ask(served, HEAD + b"\r\n" + _chunks(b" " * 100_000 + _body(), size) + b"\r\n")
    assert (status, body["error"]["code"]) == (400, "too_much_framing")  # type: ignore[index]
    assert served.dispatcher.requests == []


@pytest.mark.parametrize(("num_bytes", "size"), [(300_000, 8), (300, 1), (2_000_000, 1000)])
async def test_chunks_of_any_other_kind_are_one_body(num_bytes: int, size: int) -> None:
    served = serve(Script("ab"))
    status, _, _ = await _ask(served, HEAD + b"\r\n" + _chunks(b" " * num_bytes + _body("hello"), size) + b"\r\n")
    assert status == 200
    assert served.request.num_prompt_tokens == len("hello")


async def test_a_chunk_extension_without_end_ends_the_request() -> None:
    status, body, _ = await _ask(serve(), HEAD + b"\r\n1;" + b"a" * 2 * MAX_FRAMING_BYTES)
    assert (status, body["error"]["code"]) == (400, "too_much_framing")  # type: ignore[index]


# --- heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [b"x: " + b"a" * (MAX_HEAD_BYTES + 6000) + b"\r\n", b"x: y\r\n" * (MAX_HEADERS + 1)], ids=["long", "many"]
)
async def test_a_head_that_comes_at_once_has_the_same_limits(fields: bytes) -> None:
    status, body, _ = await _ask(serve(), b"GET /live HTTP/1.1\r\nhost: x\r\n" + fields + b"\r\n")
    assert (status, body["error"]["code"]) == (431, "request_head_too_large")  # type: ignore[index]


async def test_a_large_head_within_the_limits_is_answered() -> None:
    fields = b"x: " + b"a" * (MAX_HEAD_BYTES - 6000) + b"\r\n"
    status, _, _ = await _ask(serve(), b"GET /live HTTP/1.1\r\nhost: x\r\n" + fields + b"\r\n")
    assert status == 200


# --- the count ----------------------------------------------------------------------------------------------


def test_content_pays_for_as_much_framing() -> None:
    message = MessageBytes.begin()
    message.end_head()
    message.add_piece(4096)
    for _ in range(1000):
        message.add_content(2048)
        message.add_piece(4096)
    message = MessageBytes.begin()
    message.end_head()
    message.add_piece(4096)
    with pytest.raises(RequestError, match="send larger chunks"):
        for _ in range(1000):
            message.add_content(1000)
            message.add_piece(4096)


def test_content_does_not_pay_for_trailers() -> None:
    message = MessageBytes.begin()
    message.end_head()
    message.add_piece(4096)
    message.add_content(10 * 2**20)
    message.add_piece(10 * 2**20)
    for _ in range(MAX_FRAMING_BYTES // 4096):
        message.add_piece(4096)
    with pytest.raises(RequestError):
        message.add_piece(4096)


# --- turns --------------------------------------------------------------------------------------------------


class _Reader:
    """Its pieces take a millisecond each."""

    def __init__(self, name: str, num_pieces: int, log: list[str], clock: FakeClock) -> None:
        self.name, self.num_left, self.log, self.clock = name, num_pieces, log, clock

    def parse_piece(self) -> bool:
        self.log.append(self.name)
        self.clock.advance(0.001)
        self.num_left -= 1
        return self.num_left > 0

    def hold(self) -> None:
        self.log.append(f"hold {self.name}")

    def release(self) -> None:
        self.log.append(f"release {self.name}")


async def test_connections_parse_by_turns_and_give_the_loop_back() -> None:
    log: list[str] = []
    clock = FakeClock()
    intake = Intake(clock)
    pieces_per_turn = round(TURN_S / 0.001)
    intake.offer(_Reader("a", pieces_per_turn + 2, log, clock))
    assert log == ["a"] * pieces_per_turn + ["hold a"]
    intake.offer(_Reader("b", 1, log, clock))  # the turn is over for everybody
    assert log.count("b") == 0 and "hold b" in log
    log.clear()
    await asyncio.sleep(0)
    assert log == ["a", "b", "release b", "a", "release a"]


async def test_a_flood_of_one_connection_does_not_keep_another_waiting() -> None:
    log: list[str] = []
    clock = FakeClock()
    intake = Intake(clock)
    intake.offer(_Reader("flood", 1000, log, clock))
    await asyncio.sleep(0)
    intake.offer(_Reader("small", 1, log, clock))
    log.clear()
    await asyncio.sleep(0)
    assert log.index("small") <= 1


# --- what nobody wants --------------------------------------------------------------------------------------


async def test_an_early_answer_comes_though_its_body_is_large() -> None:
    served = serve(api_keys=("k",))
    body = b" " * 20_000_000
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with listening(served) as address, connected(address) as (reader, writer):
        writer.write(head + body)
        await writer.drain()  # all of it is taken from us
        got, _ = await read_answer(reader)
    assert got.startswith(b"HTTP/1.1 401 ") and b"connection: close" in got  # what comes next is not parsed
