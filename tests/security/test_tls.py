"""Clients by TLS, over real sockets: what they are shown, handshakes that do not end, reloads, clients that leave."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import ssl
import threading
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from kvferry.common.errors import ConfigError
from kvferry.router.access.tls import ServerTls
from kvferry.router.http import tls_listener
from kvferry.router.http.connection_limits import Connections
from kvferry.router.http.http_server import HttpServer
from kvferry.router.http.leaving import Connection
from kvferry.settings.sockets import listen
from kvferry.settings.tls import admin_scheme, http_scheme, read_tls
from kvferry.wire.address import Address

from ..certificates import client_context, common_name, router_config, write_certificate
from ..router.fakes import Script, serve
from .connections import GET, LIMIT_S, comes, connected, count, listening, post, read_answer

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
        await comes(lambda: count(served, 'kvferry_slow_clients_total{kind="handshake"}'))
    assert not served.dispatcher.requests


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00\x01\x00"])
async def test_what_is_no_handshake_or_has_no_end_is_cut_and_counted(
    tls: ServerTls, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_listener, "HANDSHAKE_LIMIT_S", 0.1)
    served = serve()
    async with listening(served, certificates=tls) as address, connected(address) as (reader, writer):
        writer.write(said)
        async with asyncio.timeout(LIMIT_S):
            assert b"HTTP" not in await reader.read()
        await comes(lambda: count(served, 'kvferry_slow_clients_total{kind="handshake"}'))


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
    async with listening(served, certificates=tls) as address, asyncio.timeout(LIMIT_S):
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
            await comes(lambda: count(served, 'kvferry_slow_clients_total{kind="read"}'))
            await comes(lambda: not len(served.app.api.in_flight))
            writer.transport.abort()
            del reader


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
