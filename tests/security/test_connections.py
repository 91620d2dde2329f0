"""Connections over real sockets: too many of them, slow ones, ones that go wrong, and what the others notice."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from contextlib import AsyncExitStack

import pytest

from kvferry.router.http.connection_limits import Connections
from kvferry.router.http.http_server import HttpServer
from kvferry.router.http.protocol import DeadlineProtocol
from kvferry.settings.sockets import listen
from kvferry.wire.address import Address

from ..router.fakes import Script, serve
from .connections import GET, connected, count, listening, post, read_answer


class _Quick(DeadlineProtocol):
    head_limit_s = 0.05
    write_limit_s = 0.05
    linger_s = 0.05


class _Idle(_Quick):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.timeout_keep_alive = 0.05  # type: ignore[assignment]
        super().connection_made(transport)


# --- how many ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "per_address", "reason"), [(2, 9, "to this server"), (9, 2, "this address")])
async def test_where_every_connection_works_a_newcomer_is_told_to_come_back(
    total: int, per_address: int, reason: str
) -> None:
    served = serve(Script("ab", hold_at=1))
    async with listening(served, total=total, per_address=per_address) as address, AsyncExitStack() as stack:
        for _ in range(2):
            reader, writer = await stack.enter_async_context(connected(address))
            writer.write(post(stream=True))
            await reader.readuntil(b"\n\n")
        reader, _ = await stack.enter_async_context(connected(address))
        head, body = await read_answer(reader)
        assert head.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in head and b"connection: close" in head
        error = json.loads(body)["error"]
        assert (error["code"], error["type"]) == ("overloaded", "server_error") and reason in error["message"]
        assert await reader.read() == b""
    assert count(served, "kvferry_refused_connections_total") == 1


async def test_a_newcomer_takes_the_place_of_the_one_that_has_waited_longest() -> None:
    served = serve()
    async with listening(served, total=2) as address, AsyncExitStack() as stack:
        idle, _idle_writer = await stack.enter_async_context(connected(address))
        half, half_writer = await stack.enter_async_context(connected(address))
        half_writer.write(b"GET /live HTTP/1.1\r\n")
        for old in (idle, half):
            reader, writer = await stack.enter_async_context(connected(address))
            writer.write(GET)
            assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 ")
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await old.readexactly(1)
    assert count(served, 'kvferry_refused_connections_total{reason="evicted"}') == 2


@pytest.mark.parametrize("is_read", [False, True])
async def test_a_request_that_has_come_is_answered_though_a_newcomer_wants_its_place(is_read: bool) -> None:
    """A proxy under a burst asks by all connections that it kept, and opens more."""
    served, sock = serve(), listen(Address("127.0.0.1", 0))
    books = Connections(1, 1, served.metrics)
    server = HttpServer(served.app, books=books)
    async with server.serving(sock), connected(sock.getsockname()) as (reader, writer):
        writer.write(GET)
        await read_answer(reader)
        [connection] = server.connections
        if is_read:  # and waits for its turn to be parsed
            connection.hold()
        else:
            writer.write(GET)  # the kernel has it
        assert books.open(_Named(), "127.0.0.1") == "address"
        if is_read:
            connection.release()
            writer.write(GET)
        assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 ")


async def test_an_idle_connection_is_kept_for_longer_than_proxies_keep_theirs() -> None:
    """Else a proxy's request may meet the end of its connection; Google's balancers keep them for 600 s, for good."""
    served, sock = serve(), listen(Address("127.0.0.1", 0))
    server = HttpServer(served.app)
    async with server.serving(sock), connected(sock.getsockname()) as (reader, writer):
        writer.write(GET)
        await read_answer(reader)
        assert server.connections[0].timeout_keep_alive > 600


async def test_one_address_that_is_full_leaves_the_others_alone() -> None:
    served = serve(Script("ab", hold_at=1))
    async with listening(served, per_address=1) as address, AsyncExitStack() as stack:
        reader, writer = await stack.enter_async_context(connected(address))
        writer.write(post(stream=True))
        await reader.readuntil(b"\n\n")
        reader, writer = await stack.enter_async_context(connected(address, "127.0.0.2"))
        writer.write(GET)
        assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 ")


async def test_a_connection_that_ended_makes_room() -> None:
    served = serve()
    async with listening(served, total=1) as address:
        for _ in range(3):
            async with connected(address) as (reader, writer):
                writer.write(GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
                assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    assert count(served, "kvferry_refused_connections_total") == 0


class _Named:
    """A connection that only the books know."""

    def __init__(self, *, may_end: bool = True) -> None:
        self.may_end = may_end
        self.is_evicted = False

    def evict(self) -> bool:
        self.is_evicted = self.may_end
        return self.may_end


def test_an_ipv6_network_is_one_address_and_a_mapped_ipv4_address_is_itself() -> None:
    books = Connections(10, 1)
    first = _Named()
    assert books.open(first, "2001:db8::1") == ""
    books.work(first)
    assert books.open(_Named(), "2001:db8::ffff") == "address"
    assert books.open(_Named(), "2001:db8:0:1::1") == ""
    mapped = _Named()
    assert books.open(mapped, "::ffff:10.0.0.1") == ""
    books.work(mapped)
    assert books.open(_Named(), "10.0.0.1") == "address"


@pytest.mark.parametrize(("num_busy", "told"), [(1, ["", ""]), (17, ["total", ""]), (20, ["total", "total"])])
def test_an_answer_on_its_way_keeps_its_place_and_few_are_asked_for_theirs(num_busy: int, told: list[str]) -> None:
    books = Connections(20, 20)
    old = [_Named(may_end=at >= num_busy) for at in range(20)]
    assert [books.open(each, "10.0.0.1") for each in old] == [""] * 20
    assert [books.open(_Named(), "10.0.0.2") for _ in told] == told
    num_evicted = told.count("")
    assert [each.is_evicted for each in old] == [num_busy <= at < num_busy + num_evicted for at in range(20)]
    assert len(books) == 20


def test_the_books_forget_what_has_ended() -> None:
    books = Connections(10, 10)
    for number in range(1000):
        connection = _Named()
        assert books.open(connection, f"10.0.{number % 256}.{number // 256}") == ""
        books.work(connection)
        books.wait(connection)
        books.close(connection)
        books.close(connection)
    assert len(books) == 0 and not books._num_from and not books._waiting and not books._waiting_from


# --- slow ones --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trickle", [b"", b"\r\n"])
async def test_a_connection_that_asks_nothing_ends_at_its_limit_whatever_it_sends(trickle: bytes) -> None:
    served = serve()
    async with listening(served, protocol=_Idle) as address, connected(address) as (reader, writer):
        sending = asyncio.create_task(_send_forever(writer, trickle)) if trickle else None
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        if sending is not None:
            sending.cancel()
    assert count(served, 'kvferry_slow_clients_total{kind="idle"}') == 1


async def _send_forever(writer: asyncio.StreamWriter, data: bytes) -> None:
    while True:
        writer.write(data)
        await asyncio.sleep(0.01)


async def test_slow_heads_are_counted_and_closed() -> None:
    served = serve()
    async with listening(served, protocol=_Quick) as address, connected(address) as (reader, writer):
        writer.write(b"GET /live HTTP/1.1\r\nx-slow: ")
        assert await reader.read() == b""
    assert count(served, 'kvferry_slow_clients_total{kind="head"}') == 1


async def test_an_answer_before_the_bodys_end_reaches_the_client_and_ends_the_connection() -> None:
    served = serve(api_keys=("k",))
    async with listening(served, protocol=_Quick) as address, connected(address) as (reader, writer):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n{")
        head, body = await read_answer(reader)
        assert head.startswith(b"HTTP/1.1 401 ") and json.loads(body)["error"]["code"] == "invalid_api_key"
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            sending = asyncio.create_task(_send_forever(writer, b" " * 1000))
            await reader.readexactly(1)
        sending.cancel()


async def test_a_whole_body_under_the_refusal_keeps_the_connection() -> None:
    served = serve(api_keys=("k",))
    async with listening(served) as address, connected(address) as (reader, writer):
        for _ in range(2):
            writer.write(post())
            assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 401 ")


async def test_a_slow_reader_of_a_whole_answer_is_cut_too() -> None:
    served = serve(Script("x" * 400, tokens_per_update=400))
    async with listening(served, protocol=_Quick) as address:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(address)
            sock.sendall(post(max_tokens=400, logprobs=20, n=16))
            async with asyncio.timeout(60):
                while not count(served, 'kvferry_slow_clients_total{kind="read"}'):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
    assert len(served.app.api.in_flight) == 0


async def test_a_head_of_too_many_bytes_is_refused_by_name() -> None:
    async with listening(serve()) as address, connected(address) as (reader, writer):
        writer.write(b"GET /live HTTP/1.1\r\n" + b"x-a: " + b"a" * 30_000 + b"\r\n" + b"x-b: " + b"b" * 40_000)
        head, body = await read_answer(reader)
        assert head.startswith(b"HTTP/1.1 431 ") and json.loads(body)["error"]["code"] == "request_head_too_large"


# --- protocol ---------------------------------------------------------------------------------------------


async def test_what_is_sent_behind_an_unanswered_request_is_not_taken() -> None:
    served = serve(Script("ab"))
    async with listening(served) as address, connected(address) as (reader, writer):
        writer.write(post(stream=True) * 50)
        answer = await reader.read()
    assert answer.count(b"HTTP/1.1 200 ") == 1 and answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert len(served.dispatcher.requests) == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("way", ["fin", "rst"])
async def test_a_client_that_pipelines_and_leaves_is_noticed(stream: bool, way: str) -> None:
    served = serve(Script("ab", hold_at=0))
    async with listening(served) as address:
        with socket.socket() as sock:
            sock.connect(address)
            sock.sendall(post(stream=stream) + GET)
            await served.dispatcher.held.wait()
            if way == "rst":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await served.dispatcher.abort_seen.wait()
    assert served.dispatcher.aborted == [served.request.request_id]


@pytest.mark.parametrize("size", [1, 10, 60])
async def test_a_client_that_leaves_within_its_body_leaves_nothing_behind(size: int) -> None:
    served = serve()
    async with listening(served) as address:
        async with connected(address) as (_, writer):
            writer.write(post()[:-size])
            await writer.drain()
        async with connected(address) as (reader, writer):  # the server is as it was
            writer.write(GET)
            assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 ")
    assert served.dispatcher.requests == [] and served.app.api.body_room.num_bytes == 0


@pytest.mark.parametrize(
    "request_line",
    [b"CONNECT example.org:443 HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET http://[::1 HTTP/1.1", b"GET /\xff HTTP/1.1",
     b"GET /live HTTP/9.9", b"PRI * HTTP/2.0", b"GET /%00%ff%2e%2e HTTP/1.1", b"BREW /pot HTTP/1.1"],
)  # fmt: skip
async def test_odd_request_lines_get_an_answer_in_the_same_shape(request_line: bytes) -> None:
    async with listening(serve(api_keys=("k",))) as address, connected(address) as (reader, writer):
        writer.write(request_line + b"\r\nhost: x\r\n\r\n")
        head, body = await read_answer(reader)
    assert head.split()[1] in (b"400", b"401", b"404", b"405")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


async def test_an_upgrade_is_answered_as_plain_http_and_then_the_connection_ends() -> None:
    async with listening(serve()) as address, connected(address) as (reader, writer):
        for name in (b"h2c", b"websocket"):
            async with connected(address) as (reader, writer):
                writer.write(GET.replace(b"\r\n\r\n", b"\r\nconnection: upgrade\r\nupgrade: " + name + b"\r\n\r\n"))
                answer = await reader.read()
                assert answer.startswith(b"HTTP/1.1 200 ") and b"connection: close" in answer


@pytest.mark.parametrize(
    "headers",
    [b"content-length: 5\r\ntransfer-encoding: chunked", b"content-length: 5\r\ncontent-length: 6",
     b"transfer-encoding: chunked, identity", b"content-length: -1", b"content-length: 0x10"],
)  # fmt: skip
async def test_a_body_whose_length_is_told_in_two_ways_is_refused(headers: bytes) -> None:
    served = serve()
    async with listening(served) as address, connected(address) as (reader, writer):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + headers + b"\r\n\r\n0\r\n\r\n")
        head, _ = await read_answer(reader)
    assert head.startswith(b"HTTP/1.1 400 ")
    assert served.dispatcher.requests == []
