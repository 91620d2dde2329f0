"""TLS connections end: when a server leaves or stops, when a newcomer needs the place; nobody says goodbye."""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvferry.router.access.tls import ServerTls
from kvferry.router.http import http_server, stream_writer, tls_listener
from kvferry.router.http.connection_limits import Connections
from kvferry.router.http.http_server import HttpServer
from kvferry.router.http.leaving import Connection
from kvferry.settings.sockets import listen
from kvferry.wire.address import Address

from ..certificates import client_context, router_config, write_certificate
from ..router.fakes import Script, serve
from .connections import GET, LIMIT_S, comes, connected, post, read_answer


@pytest.fixture
def tls(tmp_path: Path) -> ServerTls:
    return ServerTls(router_config(**write_certificate(tmp_path)))


async def test_a_handshake_that_has_begun_when_the_server_leaves_is_answered_once(
    tls: ServerTls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose client has said nothing is waited for as long as an idle connection."""
    monkeypatch.setattr(tls_listener, "HANDSHAKE_LIMIT_S", 2 * LIMIT_S)
    sock = listen(Address("127.0.0.1", 0))
    server = HttpServer(serve().app, certificates=tls)
    async with server.serving(sock):
        address = sock.getsockname()
        early = socket.create_connection(address)
        silent = socket.create_connection(address)
        await comes(lambda: server._server.is_shaking)
        server.leave(1.0)
        early.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=early, ssl=client_context(), server_hostname="localhost")
        await comes(lambda: any(isinstance(each, Connection) and each.is_leaving for each in server.connections))
        writer.write(GET)
        head, _ = await read_answer(reader)
        assert head.startswith(b"HTTP/1.1 200 ") and b"connection: close" in head
        assert await reader.read() == b""
        writer.close()
        async with asyncio.timeout(LIMIT_S):
            await server.left()
        silent.close()


async def test_a_client_whose_hello_has_just_come_is_not_taken_for_a_silent_one(tls: ServerTls) -> None:
    sock = listen(Address("127.0.0.1", 0))
    server = HttpServer(serve().app, certificates=tls)
    async with server.serving(sock):
        with socket.create_connection(sock.getsockname()) as client:
            await comes(lambda: server._server.is_shaking)
            [listener] = server._server.servers
            assert isinstance(listener, tls_listener.TlsListener)
            client.sendall(b"\x16")
            for _ in range(2):  # before the loop looks at the socket, and when it has read what was there
                listener._end_silent()
                await asyncio.sleep(0.05)
                assert listener.is_shaking


def blocking_client(address: tuple[str, int], tls: ssl.SSLContext | None, said: bytes = b"") -> socket.socket:
    """It reads as it is told to, and says goodbye to nobody."""
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    own.connect(address)
    client = own if tls is None else tls.wrap_socket(own, server_hostname="localhost")
    client.sendall(said)
    return client


@asynccontextmanager
async def slow_client(
    num_tokens: int = 400, *, tls: ServerTls | None = None, books: Connections | None = None
) -> AsyncIterator[tuple[HttpServer, socket.socket]]:
    """A client that has not read its answer yet, which is more than the sockets hold if it has 400 tokens."""
    sock = listen(Address("127.0.0.1", 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server = HttpServer(serve(Script("x" * 400, tokens_per_update=400)).app, certificates=tls, books=books)
    context, asked = None if tls is None else client_context(), post(max_tokens=num_tokens, logprobs=20)
    async with server.serving(sock):
        with await asyncio.to_thread(blocking_client, sock.getsockname(), context, asked) as client:
            await comes(lambda: server.connections and server.connections[0].cycle is not None)
            await comes(lambda: not server.connections[0].has_request)
            yield server, client


async def read_large_answer(client: socket.socket) -> bytes:
    def read() -> bytes:
        answer = b""
        while not answer.endswith(b"}}}"):
            part = client.recv(2**16)
            assert part, "the answer was cut"
            answer += part
        return answer

    return await asyncio.to_thread(read)


async def read_rest(client: socket.socket) -> bytes:
    def read() -> bytes:
        answer = b""
        while part := client.recv(2**16):
            answer += part
        return answer

    return await asyncio.to_thread(read)


async def test_a_client_that_idles_and_says_no_goodbye_is_not_waited_for(tls: ServerTls) -> None:
    async with slow_client(1, tls=tls) as (server, _):
        server.leave(0.05)
        async with asyncio.timeout(LIMIT_S / 3):
            await server.left()


@pytest.mark.parametrize("is_kernel_quick", [False, True])
async def test_a_client_that_says_no_goodbye_has_all_that_was_written(
    tls: ServerTls, is_kernel_quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with slow_client(1, tls=tls) as (server, client):
        server.connections[0].stream_writer.write(b"x" * 300_000)
        if is_kernel_quick:  # it has sent all that it was given, and both transports have more
            monkeypatch.setattr(stream_writer, "num_unsent", lambda _: 0)
        server.leave(0.01)
        await asyncio.sleep(0.15)
        assert server.connections
        assert (await read_rest(client)).endswith(b"x" * 300_000)
        async with asyncio.timeout(LIMIT_S / 3):
            await server.left()


@pytest.mark.parametrize("by_tls", [False, True])
async def test_a_newcomer_takes_no_place_of_one_whose_answer_is_on_its_way(tls: ServerTls, by_tls: bool) -> None:
    books = Connections(1, 1)
    async with slow_client(tls=tls if by_tls else None, books=books) as (server, client):
        context = client_context() if by_tls else None
        with await asyncio.to_thread(blocking_client, client.getpeername(), context) as refused:
            assert (await asyncio.to_thread(refused.recv, 2**12)).startswith(b"HTTP/1.1 503 ")
            async with asyncio.timeout(LIMIT_S / 3):  # whom no place is for holds no file either
                await comes(lambda: len(server.connections) == 1)
        await read_large_answer(client)
        await comes(lambda: not server.connections[0].stream_writer.has_unsent())
        async with connected(client.getpeername(), tls=context) as (reader, writer):
            writer.write(GET)
            assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 ")


async def test_a_server_that_stops_waits_for_no_handshake_and_for_no_goodbye(
    tls: ServerTls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_FLUSH_S", 2 * LIMIT_S)
    monkeypatch.setattr(tls_listener, "HANDSHAKE_LIMIT_S", 2 * LIMIT_S)
    async with asyncio.timeout(LIMIT_S):
        async with slow_client(1, tls=tls) as (server, idle):
            with socket.create_connection(idle.getpeername()):
                await comes(lambda: server._server.is_shaking)
                server.stop()
                await server.left()
        assert not server._server.is_shaking


async def test_a_handshake_that_ends_after_a_server_stopped_to_accept_keeps_no_connection(tls: ServerTls) -> None:
    sock = listen(Address("127.0.0.1", 0))
    server = HttpServer(serve().app, certificates=tls)
    async with server.serving(sock), asyncio.timeout(LIMIT_S):
        early = socket.create_connection(sock.getsockname())
        await comes(lambda: server._server.is_shaking)
        [listener] = server._server.servers
        listener.close()
        early.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=early, ssl=client_context(), server_hostname="localhost")
        assert await reader.read() == b""
        writer.close()


async def test_what_was_written_last_comes_though_a_newcomer_has_its_place(
    tls: ServerTls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has sent all that it was given, and the transport has more, of which TLS does not know."""
    async with slow_client(1, tls=tls) as (server, client):
        [connection] = server.connections
        monkeypatch.setattr(stream_writer, "num_unsent", lambda _: 0)
        connection.stream_writer.write(b"x" * 50_000)
        assert not connection.evict()  # it is not even written
        connection.stream_writer.flush()
        assert connection.evict()
        assert (await read_rest(client)).endswith(b"x" * 50_000)
        await comes(lambda: not server.connections)


async def test_no_goodbye_is_waited_for_where_no_file_can_be_opened(tls: ServerTls) -> None:
    async with slow_client(1, tls=tls) as (server, _):
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        try:
            server.leave(0.0)
            async with asyncio.timeout(LIMIT_S / 3):
                await server.left()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_nothing_is_kept_of_a_connection_that_is_told_to_end_when_it_is_lost(tls: ServerTls) -> None:
    """As by an application that fails when its client has left."""
    async with slow_client(tls=tls) as (server, client):
        [connection] = server.connections
        client.close()
        await comes(lambda: not server.connections)
        connection.end()
        known = weakref.ref(connection)
        del connection
        await comes(lambda: known() is None)
