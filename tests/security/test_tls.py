"""Clients by TLS, over real sockets: what they are shown, handshakes that do not end, reloads, clients that leave."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from kvferry.common.errors import ConfigError
from kvferry.router.access.tls import ServerTls
from kvferry.router.http import http_server, stream_writer, tls_listener
from kvferry.router.http.connection_limits import Connections
from kvferry.router.http.http_server import HttpServer
from kvferry.router.http.leaving import Connection
from kvferry.settings.sockets import listen
from kvferry.settings.tls import admin_scheme, http_scheme, read_tls
from kvferry.wire.address import Address

from ..certificates import client_context, common_name, router_config, write_certificate
from ..router.fakes import Script, serve
from .connections import GET, connected, count, listening, post, read_answer

_LIMIT_S = 30.0
LOCKED = """-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAjnf90BSZ7EpwICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEELzMaw8D4jy6fqkVEsu5mQEgZAQ
Lg5j+ngToqaLnxtsuLya6qTg2whJhVQwpUHHe0HptfNwjv1X0f1PIgt9gwujCiyu
Ljq2SvnJ+P0VNL3TK2QXHWKm74xGdDpnntrqRSu3INySYPBeAYCye3EgV+voRhxL
bEVN5BaJeUOpmBcyO/PW2++5d1yY5wCQSwTPermFUX297nzyB+0MGdoqH2ms6hI=
-----END ENCRYPTED PRIVATE KEY-----
"""


@pytest.fixture
def tls(tmp_path: Path) -> ServerTls:
    return ServerTls(router_config(**write_certificate(tmp_path)))


async def _comes(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(_LIMIT_S):
        while not condition():  # noqa: ASYNC110  # what is waited for tells nobody
            await asyncio.sleep(0.01)


async def test_answers_and_streams_come_by_tls(tls: ServerTls) -> None:
    served = serve(Script("abc"))
    async with (
        listening(served, certificates=tls) as address,
        connected(address, tls=client_context()) as (reader, writer),
    ):
        assert writer.get_extra_info("ssl_object").version() in ("TLSv1.3", "TLSv1.2")
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() is None  # this client asked for none
        for _ in range(3):  # on one connection
            writer.write(GET)
            assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 ")
        writer.write(post(stream=True).replace(b"host: x", b"host: x\r\nconnection: close"))
        assert (await reader.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_a_large_answer_and_a_large_body_come_whole(tls: ServerTls) -> None:
    served = serve(Script("x" * 400, tokens_per_update=100))
    async with (
        listening(served, certificates=tls) as address,
        connected(address, tls=client_context()) as (reader, writer),
    ):
        writer.write(post(max_tokens=400, logprobs=20, n=16, user="y" * 300_000))
        head, body = await read_answer(reader)
    assert head.startswith(b"HTTP/1.1 200 ") and len(body) > 2**19
    assert len(json.loads(body)["choices"]) == 16


@pytest.mark.parametrize("asked", [GET, post(user="x" * 200_000)], ids=["GET", "a large body"])
async def test_who_asks_by_plain_http_is_told_to_use_tls(tls: ServerTls, asked: bytes) -> None:
    served = serve()
    async with listening(served, certificates=tls) as address, connected(address) as (reader, writer):
        writer.write(asked)
        head, body = await read_answer(reader)
        assert head.startswith(b"HTTP/1.1 400 ") and b"connection: close" in head
        assert "https://" in json.loads(body)["error"]["message"] and await reader.read() == b""
        writer.close()
        await _comes(lambda: count(served, 'kvferry_slow_clients_total{kind="handshake"}'))
    assert not served.dispatcher.requests


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00\x01\x00"])
async def test_what_is_no_handshake_or_has_no_end_is_cut_and_counted(
    tls: ServerTls, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_listener, "HANDSHAKE_LIMIT_S", 0.1)
    served = serve()
    async with listening(served, certificates=tls) as address, connected(address) as (reader, writer):
        writer.write(said)
        async with asyncio.timeout(_LIMIT_S):
            assert b"HTTP" not in await reader.read()
        await _comes(lambda: count(served, 'kvferry_slow_clients_total{kind="handshake"}'))


async def test_handshakes_without_end_keep_nobody_out(tls: ServerTls) -> None:
    served = serve()
    books = Connections(4, 4, served.metrics)
    sock = listen(Address("127.0.0.1", 0))
    async with HttpServer(served.app, books=books, certificates=tls).serving(sock), AsyncExitStack() as stack:
        address = sock.getsockname()
        for _ in range(40):
            await stack.enter_async_context(connected(address))
        async with connected(address, tls=client_context()) as (reader, writer):
            writer.write(GET)
            assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 ")
        assert len(books) <= 4
        assert count(served, 'kvferry_refused_connections_total{reason="evicted"}') >= 36


async def test_a_connection_has_the_place_of_its_handshake(tls: ServerTls) -> None:
    served = serve()
    async with listening(served, total=1, per_address=1, certificates=tls) as address:
        for _ in range(3):
            async with connected(address, tls=client_context()) as (reader, writer):
                writer.write(GET)
                assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 ")
    assert count(served, 'kvferry_refused_connections_total{reason="address"}') == 0


async def test_where_every_connection_works_a_newcomer_is_told_to_come_back(
    tls: ServerTls, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(Script("ab", hold_at=1))
    async with listening(served, total=1, certificates=tls) as address, AsyncExitStack() as stack:
        reader, writer = await stack.enter_async_context(connected(address, tls=client_context()))
        writer.write(post(stream=True))
        await reader.readuntil(b"\n\n")
        async with connected(address, tls=client_context()) as (reader, _):
            head, _ = await read_answer(reader)
            assert head.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in head
        assert count(served, "kvferry_refused_connections_total") == 1
        monkeypatch.setattr(tls_listener, "_MAX_REFUSING", 0)
        with pytest.raises((ssl.SSLError, OSError)):
            await stack.enter_async_context(connected(address, tls=client_context()))
        assert count(served, "kvferry_refused_connections_total") == 2


async def test_a_reload_shows_the_next_connection_the_new_certificate_and_cuts_none(tmp_path: Path) -> None:
    tls = ServerTls(router_config(**write_certificate(tmp_path)))
    async with listening(serve(), certificates=tls) as address:
        async with connected(address, tls=client_context()) as (reader, writer):
            assert common_name(writer.get_extra_info("peercert")) == "kvferry tests' server"
            write_certificate(tmp_path, "renewed")
            tls.take(tls.read())
            async with connected(address, tls=client_context()) as (_, newer):
                assert common_name(newer.get_extra_info("peercert")) == "kvferry tests' renewed server"
            writer.write(GET)
            assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 ")


async def test_clients_show_a_certificate_where_authorities_are_named(tmp_path: Path) -> None:
    authority = Path(__file__).parent.parent / "certificates" / "authority.pem"
    tls = ServerTls(router_config(**write_certificate(tmp_path), ssl_ca_certs=authority))
    own = write_certificate(tmp_path / "client", "client")
    served = serve()
    async with listening(served, certificates=tls) as address:
        async with connected(address, tls=client_context(certificate=own)) as (reader, writer):
            writer.write(GET)
            assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 ")
        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            async with connected(address, tls=client_context()) as (reader, writer):
                writer.write(GET)
                await read_answer(reader)
    assert count(served, 'kvferry_slow_clients_total{kind="handshake"}') == 1


@pytest.mark.parametrize("way", ["closed", "cut"])
async def test_a_client_that_leaves_is_noticed(tls: ServerTls, way: str) -> None:
    served = serve(Script("ab", hold_at=0))
    async with listening(served, certificates=tls) as address, asyncio.timeout(_LIMIT_S):
        _, writer = await asyncio.open_connection(*address, ssl=client_context())
        writer.write(post(stream=True))
        await served.dispatcher.held.wait()
        if way == "cut":
            writer.transport.abort()
        else:
            writer.close()
        await served.dispatcher.abort_seen.wait()
    assert served.dispatcher.aborted == [served.request.request_id]


async def test_a_listener_that_may_open_no_more_files_accepts_again_soon(
    tls: ServerTls, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, failures = socket.socket.accept, [OSError(errno.EMFILE, "Too many open files")] * 2

    def accept_at_last(self: socket.socket) -> object:
        if failures:
            raise failures.pop()
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", accept_at_last)
    async with (
        listening(serve(), certificates=tls) as address,
        connected(address, tls=client_context()) as (reader, writer),
    ):
        writer.write(GET)
        assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 ")
    assert not failures


class _Quick(Connection):
    write_limit_s = 0.05


async def test_a_client_that_does_not_read_is_cut(tls: ServerTls) -> None:
    served = serve(Script("x" * 400, tokens_per_update=400))
    async with listening(served, protocol=_Quick, certificates=tls) as address:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, address)
            reader, writer = await asyncio.open_connection(sock=sock, ssl=client_context(), server_hostname="localhost")
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(post(max_tokens=400, logprobs=20, n=16))
            await _comes(lambda: count(served, 'kvferry_slow_clients_total{kind="read"}'))
            await _comes(lambda: not len(served.app.api.in_flight))
            writer.transport.abort()
            del reader


async def test_a_handshake_that_has_begun_when_the_server_leaves_is_answered_once(
    tls: ServerTls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose client has said nothing is waited for as long as an idle connection."""
    monkeypatch.setattr(tls_listener, "HANDSHAKE_LIMIT_S", 2 * _LIMIT_S)
    sock = listen(Address("127.0.0.1", 0))
    server = HttpServer(serve().app, certificates=tls)
    async with server.serving(sock):
        address = sock.getsockname()
        early = socket.create_connection(address)
        silent = socket.create_connection(address)
        await _comes(lambda: server._server.is_shaking)
        server.leave(0.5)
        early.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=early, ssl=client_context(), server_hostname="localhost")
        writer.write(GET)
        head, _ = await read_answer(reader)
        assert head.startswith(b"HTTP/1.1 200 ") and b"connection: close" in head
        assert await reader.read() == b""
        writer.close()
        async with asyncio.timeout(_LIMIT_S):
            await server.left()
        silent.close()


async def test_a_client_whose_hello_has_just_come_is_not_taken_for_a_silent_one(tls: ServerTls) -> None:
    sock = listen(Address("127.0.0.1", 0))
    server = HttpServer(serve().app, certificates=tls)
    async with server.serving(sock):
        with socket.create_connection(sock.getsockname()) as client:
            await _comes(lambda: server._server.is_shaking)
            [listener] = server._server.servers
            assert isinstance(listener, tls_listener.TlsListener)
            client.sendall(b"\x16")
            listener._end_silent()  # before the loop looks at the socket
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
            await _comes(lambda: server.connections and server.connections[0].cycle is not None)
            await _comes(lambda: not server.connections[0].has_request)
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


async def test_a_client_that_idles_and_says_no_goodbye_is_not_waited_for(tls: ServerTls) -> None:
    async with slow_client(1, tls=tls) as (server, _):
        server.leave(0.05)
        async with asyncio.timeout(_LIMIT_S / 3):
            await server.left()


@pytest.mark.parametrize("is_kernel_quick", [False, True])
async def test_a_client_that_says_no_goodbye_has_all_that_was_written(
    tls: ServerTls, is_kernel_quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with slow_client(tls=tls) as (server, client):
        if is_kernel_quick:  # it has sent all that it was given, and the transport has more
            monkeypatch.setattr(stream_writer, "num_unsent", lambda _: 0)
        server.leave(0.01)
        await asyncio.sleep(0.15)
        assert server.connections
        await read_large_answer(client)
        async with asyncio.timeout(_LIMIT_S / 3):
            await server.left()


@pytest.mark.parametrize("by_tls", [False, True])
async def test_a_newcomer_takes_no_place_of_one_whose_answer_is_on_its_way(tls: ServerTls, by_tls: bool) -> None:
    books = Connections(1, 1)
    async with slow_client(tls=tls if by_tls else None, books=books) as (server, client):
        context = client_context() if by_tls else None
        with await asyncio.to_thread(blocking_client, client.getpeername(), context) as refused:
            assert (await asyncio.to_thread(refused.recv, 2**12)).startswith(b"HTTP/1.1 503 ")
            async with asyncio.timeout(_LIMIT_S / 3):  # whom no place is for holds no file either
                await _comes(lambda: len(server.connections) == 1)
        await read_large_answer(client)
        await _comes(lambda: not server.connections[0].stream_writer.has_unsent())
        async with connected(client.getpeername(), tls=context) as (reader, writer):
            writer.write(GET)
            assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 ")


async def test_a_server_that_stops_waits_for_no_handshake_and_for_no_goodbye(
    tls: ServerTls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_FLUSH_S", 2 * _LIMIT_S)
    async with asyncio.timeout(tls_listener.HANDSHAKE_LIMIT_S):
        async with slow_client(1, tls=tls) as (server, idle):
            with socket.create_connection(idle.getpeername()):
                await _comes(lambda: server._server.is_shaking)
                server.stop()
                await server.left()
        assert not server._server.is_shaking


def test_the_admin_listener_speaks_tls_where_others_reach_it(tmp_path: Path) -> None:
    files = write_certificate(tmp_path)
    plain, near, far = (router_config(**fields) for fields in ({}, files, files | {"admin_host": "0.0.0.0"}))
    assert [http_scheme(config) for config in (plain, near, far)] == ["http", "https", "https"]
    assert [admin_scheme(config) for config in (plain, near, far)] == ["http", "http", "https"]
    assert read_tls(plain) is None


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"ssl_keyfile": None}, "ssl_certfile: needs its private key; set --ssl-keyfile"),
        ({"ssl_certfile": None}, "ssl_keyfile: needs the server's certificate; set --ssl-certfile"),
        ({"ssl_certfile": None, "ssl_keyfile": None, "ssl_ca_certs": "x"}, "ssl_ca_certs: needs the server's"),
        ({"ssl_certfile": "/none.pem"}, "ssl_certfile: cannot read /none.pem: No such file"),
        ({"ssl_keyfile": "/none.pem"}, "ssl_keyfile: cannot read /none.pem: No such file"),
        ({"ssl_ca_certs": "/none.pem"}, "ssl_ca_certs: cannot read /none.pem: No such file"),
        ({"ssl_certfile": "KEY"}, r"ssl_certfile: .*key\.pem holds no certificate in PEM"),
        ({"ssl_ca_certs": "KEY"}, r"ssl_ca_certs: .*key\.pem holds no certificate in PEM"),
        ({"ssl_keyfile": "CERTIFICATE"}, r"ssl_keyfile: every user may read or write .*certificate\.pem .*: chmod 600"),
        ({"ssl_keyfile": "OTHER"}, r"ssl_keyfile: .*key\.pem is not the key of .*certificate\.pem"),
        ({"ssl_keyfile": "EMPTY"}, r"ssl_keyfile: .*empty holds no private key in PEM"),
        ({"ssl_keyfile": "LOCKED"}, r"ssl_keyfile: .*locked asks for a password; give a key without one"),
    ],
)
def test_files_that_do_not_serve_are_refused_by_name(fields: dict[str, str | None], why: str, tmp_path: Path) -> None:
    own = write_certificate(tmp_path / "own")
    own["ssl_certfile"].chmod(0o644)
    places = {
        "KEY": own["ssl_keyfile"],
        "CERTIFICATE": own["ssl_certfile"],
        "OTHER": write_certificate(tmp_path / "other", "renewed")["ssl_keyfile"],
        "EMPTY": tmp_path / "empty",
        "LOCKED": tmp_path / "locked",
    }
    places["EMPTY"].touch(mode=0o600)
    places["LOCKED"].touch(mode=0o600)
    places["LOCKED"].write_text(LOCKED)
    given = {name: places.get(value, value) if value is not None else None for name, value in fields.items()}
    with pytest.raises(ConfigError, match=why):
        read_tls(router_config(**(own | given)))


@pytest.mark.parametrize("setting", ["ssl_certfile", "ssl_keyfile", "ssl_ca_certs"])
def test_a_pipe_is_refused_at_once(setting: str, tmp_path: Path) -> None:
    """Nobody writes into it, but after a while: a reload that waited would keep its process from ending."""
    files, pipe = write_certificate(tmp_path), tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    late = threading.Timer(5.0, lambda: os.close(os.open(pipe, os.O_RDWR)))
    late.start()
    with pytest.raises(ConfigError, match=rf"^{setting}: {pipe} is no regular file$"):
        read_tls(router_config(**(files | {setting: pipe})))
    assert late.is_alive()
    late.cancel()


def test_a_reload_of_files_that_do_not_serve_changes_nothing(tmp_path: Path) -> None:
    files = write_certificate(tmp_path)
    tls = ServerTls(router_config(**files))
    before = tls.context
    files["ssl_certfile"].write_text("half a certif")
    with pytest.raises(ConfigError, match="holds no certificate"):
        tls.read()
    assert tls.context is before
