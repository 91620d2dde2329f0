"""A router that stops, seen from its connections: nobody is cut, nobody is kept, nothing is waited for in vain."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from starlette.types import Receive, Scope, Send

from kvferry.router.http import http_server
from kvferry.router.http.http_server import VANISHED_S, HttpServer
from kvferry.router.http.leaving import Connection
from kvferry.settings.sockets import listen
from kvferry.wire.address import Address

from ..fakes import MODEL, Script, Served, serve

WAIT_S = 60.0
LONG_S = 60.0


@dataclass
class Site:
    served: Served
    front: HttpServer
    address: tuple[str, int]
    clients: list[Client] = field(default_factory=list)

    async def connect(self) -> Client:
        self.clients.append(Client(*await asyncio.open_connection(*self.address)))
        return self.clients[-1]


@dataclass
class Client:
    """One connection, used by hand."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def ask(self, path: str = "/live", body: bytes = b"") -> None:
        method = b"POST" if body else b"GET"
        head = [method + b" " + path.encode() + b" HTTP/1.1", b"host: x", b"content-length: %d" % len(body)]
        head.append(b"content-type: application/json")
        self.writer.write(b"\r\n".join([*head, b"", body]))

    async def head(self) -> bytes:
        async with asyncio.timeout(WAIT_S):
            return (await self.reader.readuntil(b"\r\n\r\n")).lower()

    async def rest(self) -> bytes:
        """What comes until the server closes."""
        async with asyncio.timeout(WAIT_S):
            return await self.reader.read()

    async def whole(self) -> bytes:
        """An answer whose length is told; its head."""
        head = await self.head()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        async with asyncio.timeout(WAIT_S):
            await self.reader.readexactly(length)
        return head


@asynccontextmanager
async def site(script: Script | None = None) -> AsyncIterator[Site]:
    served, sock = serve(script), listen(Address("127.0.0.1", 0))
    address = sock.getsockname()
    async with HttpServer(served.app).serving(sock) as front:
        there = Site(served, front, address)
        yield there
        for client in there.clients:
            client.writer.close()


async def _left(front: HttpServer) -> None:
    async with asyncio.timeout(WAIT_S):
        await front.left()


async def test_an_idle_connection_is_closed_after_a_while() -> None:
    async with site() as s:
        client = await s.connect()
        client.ask()
        assert b"connection: close" not in await client.whole()
        s.front.leave(0.01)
        assert await client.rest() == b""
        await _left(s.front)


async def test_an_idle_connection_may_ask_once_more_and_is_told_to_close() -> None:
    async with site() as s:
        client = await s.connect()
        client.ask()
        await client.whole()
        s.front.leave(LONG_S)
        client.ask()
        assert b"connection: close" in await client.whole()
        assert await client.rest() == b""


async def test_a_connection_that_never_asked_may_ask_too() -> None:
    async with site() as s:
        client = await s.connect()
        client.ask()
        await client.whole()
        other = await s.connect()
        other.ask()
        await other.whole()
        s.front.leave(LONG_S)
        other.ask()
        assert b"connection: close" in await other.whole()


async def test_no_new_connection_is_accepted_and_a_shared_socket_goes_on_listening() -> None:
    served, sock = serve(), listen(Address("127.0.0.1", 0))
    address = sock.getsockname()
    with sock.dup() as shared:
        async with HttpServer(served.app).serving(sock) as front:
            front.leave(0.0)
            late = Client(*await asyncio.open_connection(*address))
            late.ask()
        async with HttpServer(served.app).serving(shared):  # the next life
            assert b" 200 " in await late.head()
            late.writer.close()
    with pytest.raises(OSError):
        await asyncio.open_connection(*address)


@pytest.mark.parametrize("leaves_at", [0, 3])
async def test_a_running_stream_ends_whole(leaves_at: int) -> None:
    """Before its head is sent it is told to close; after that it is idle at its end, and may ask once more."""
    async with site(Script("Hello, world", hold_at=leaves_at)) as s:
        client = await s.connect()
        client.ask("/v1/completions", b'{"model": "%s", "prompt": "hi", "stream": true}' % MODEL.encode())
        await asyncio.wait_for(s.served.dispatcher.held.wait(), WAIT_S)
        s.front.leave(0.05)
        s.served.dispatcher.go.set()
        answer = await client.rest()
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert (b"connection: close" in answer.lower()) == (leaves_at == 0)
        await _left(s.front)


async def test_half_a_head_is_waited_for() -> None:
    async with site() as s:
        client = await s.connect()
        client.ask()
        await client.whole()
        client.writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\n")
        while not any(connection.has_request for connection in s.front.connections):  # noqa: ASYNC110
            await asyncio.sleep(0)  # the server reads it at its next turn
        s.front.leave(0.0)
        client.writer.write(b"\r\n")
        assert b"connection: close" in await client.head()


async def test_half_a_head_is_not_waited_for_by_a_server_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_FLUSH_S", 2 * WAIT_S)
    monkeypatch.setattr(Connection, "head_limit_s", 2 * WAIT_S)
    async with site() as s:
        client = await s.connect()
        client.writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\n")
        while not any(connection.has_request for connection in s.front.connections):  # noqa: ASYNC110
            await asyncio.sleep(0)
        s.front.stop()
        assert await client.rest() == b""


@pytest.mark.parametrize("is_read", [False, True])
async def test_what_has_come_before_an_idle_connection_is_closed_is_answered(is_read: bool) -> None:
    async with site() as s:
        client = await s.connect()
        client.ask()
        await client.whole()
        s.front.leave(LONG_S)
        [connection] = s.front.connections
        if is_read:  # and waits for its turn to be parsed
            connection.hold()
        else:
            client.ask()  # the kernel has it
        connection.timeout_keep_alive_handler()
        if is_read:
            connection.release()
            client.ask()
        assert b"connection: close" in await client.whole()


async def test_a_connection_that_was_told_to_close_does_so_though_the_rest_of_the_body_came_meanwhile() -> None:
    async def answer_early(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        while (await receive())["more_body"]:
            pass
        await send({"type": "http.response.body", "body": b"ok"})

    sock = listen(Address("127.0.0.1", 0))
    async with HttpServer(answer_early).serving(sock):
        client = Client(*await asyncio.open_connection(*sock.getsockname()))
        client.writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n")
        assert b"connection: close" in await client.head()
        client.writer.write(b"hi")
        assert await client.rest() == b"ok"
        client.writer.close()


async def test_a_client_whose_machine_is_gone_is_noticed_by_its_silence() -> None:
    """Nothing else tells, neither while its answer is computed nor while what was written is sent again and again."""
    async with site() as there:
        client = await there.connect()
        client.ask()
        await client.whole()
        [accepted] = there.front.connections
        sock = accepted.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * VANISHED_S
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) < VANISHED_S


async def test_a_request_that_the_end_cancels_is_told_so_and_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator's call may hang in what it loads: nobody waits for it, and no traceback is logged."""
    monkeypatch.setattr(http_server, "_FLUSH_S", 0)
    has_begun = asyncio.Event()

    async def hang(scope: Scope, receive: Receive, send: Send) -> None:
        has_begun.set()
        await asyncio.Event().wait()

    sock = listen(Address("127.0.0.1", 0))
    async with HttpServer(hang).serving(sock):
        client = Client(*await asyncio.open_connection(*sock.getsockname()))
        client.ask()
        await has_begun.wait()
    assert (await client.head()).startswith(b"http/1.1 503 ") and b"is shutting down" in await client.rest()
    assert not any(record.exc_info for record in caplog.records)
    client.writer.close()
