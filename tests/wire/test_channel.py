"""Frames cross whole or not at all, and only between those who know the secret."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Awaitable, Callable, Iterator

import pytest

from kvferry.common.errors import ConfigError, ProtocolError, WorkerLost
from kvferry.wire.address import Address
from kvferry.wire.channel import MAX_PENDING_HELLOS, Channel, connect, serve, server_address
from kvferry.wire.codec import Decoder, encode
from kvferry.wire.credentials import SharedSecret
from kvferry.wire.fields import Message
from kvferry.wire.hello import PROTOCOL_VERSION, Challenge, Hello, Refused
from kvferry.wire.results import NoCapacity
from kvferry.wire.seals import Seals
from kvferry.wire.tasks import Abort
from kvferry.wire.workers import Drain, LiveRequests

decoder: Decoder[Abort | Drain | LiveRequests] = Decoder(Abort | Drain | LiveRequests)


async def _echo(channel: Channel) -> None:
    while True:
        channel.send(decoder.decode(await channel.recv()))


async def test_messages_come_back_as_they_were_sent() -> None:
    async with await serve(Address("127.0.0.1", 0), "server", _echo, secret=SharedSecret(b"s")) as server:
        channel = await connect(server_address(server, "127.0.0.1"), "client", secret=SharedSecret(b"s"))
        message = Abort(request_id="r", attempt=3, choices=(1, 2))
        channel.send(message)
        assert decoder.decode(await channel.recv()) == message
        assert channel.peer_id == "server"
        await channel.close()


@pytest.mark.parametrize("secret", [b"", b"other"])
async def test_a_peer_without_the_secret_is_refused_with_the_reason(secret: bytes) -> None:
    refused: list[ProtocolError] = []
    async with await serve(
        Address("127.0.0.1", 0), "s", _echo, secret=SharedSecret(b"s"), on_refused=refused.append
    ) as server:
        with pytest.raises(ProtocolError, match="shared secret"):
            await connect(server_address(server, "127.0.0.1"), "client", secret=SharedSecret(*filter(None, [secret])))
        await asyncio.sleep(0)
    assert refused


def _framed(message: Message) -> bytes:
    payload = encode(message)
    return len(payload).to_bytes(4, "big") + payload


async def test_a_server_of_another_version_is_left_with_both_named() -> None:
    left = asyncio.Event()

    async def challenge(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_framed(Challenge(protocol=3, nonce=b"n" * 16)))
        await reader.read()
        writer.close()
        left.set()

    async with await asyncio.start_server(challenge, "127.0.0.1", 0) as server:
        with pytest.raises(ProtocolError, match=f"speaks protocol 3, we speak {PROTOCOL_VERSION}"):
            await connect(server_address(server, "127.0.0.1"), "client")
        await left.wait()


async def test_a_client_of_another_version_is_refused_with_both_named() -> None:
    hellos: Decoder[Challenge | Refused] = Decoder(Challenge | Refused)
    async with await serve(Address("127.0.0.1", 0), "s", _echo) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(_framed(Hello(protocol=3, id="old", nonce=b"n" * 16, mac=b"")))
        data = await reader.read()
        writer.close()
        await writer.wait_closed()
    size = int.from_bytes(data[:4], "big")
    challenge, refused = hellos.decode(data[4 : 4 + size]), hellos.decode(data[8 + size :])
    assert isinstance(challenge, Challenge) and challenge.protocol == PROTOCOL_VERSION
    assert refused == Refused(reason=f"protocol 3 is not ours ({PROTOCOL_VERSION})")


async def test_a_server_that_does_not_know_the_secret_is_not_believed() -> None:
    async with await serve(Address("127.0.0.1", 0), "s", _echo) as server:
        with pytest.raises(ProtocolError, match="shared secret"):
            await connect(server_address(server, "127.0.0.1"), "client", secret=SharedSecret(b"s"))


async def test_an_announced_frame_over_the_bound_ends_the_connection_unread() -> None:
    ended = asyncio.get_running_loop().create_future()

    async def read_one(channel: Channel) -> None:
        try:
            await channel.recv()
        except ProtocolError as error:
            ended.set_result(str(error))

    async with await serve(Address("127.0.0.1", 0), "s", read_one, max_frame_bytes=64) as server:
        channel = await connect(server_address(server, "127.0.0.1"), "client", max_frame_bytes=1024)
        channel.send(NoCapacity(request_id="x" * 200, attempt=0, reason="blocks"))
        assert "bound is 64" in await ended
        with pytest.raises(WorkerLost):
            await channel.recv()
        channel.abort()


async def test_a_message_over_the_bound_is_our_own_error() -> None:
    async with await serve(Address("127.0.0.1", 0), "s", _echo) as server:
        channel = await connect(server_address(server, "127.0.0.1"), "client", max_frame_bytes=64)
        with pytest.raises(ProtocolError, match="> 64"):
            channel.send(NoCapacity(request_id="x" * 200, attempt=0, reason="blocks"))
        channel.abort()


@contextlib.contextmanager
def _swallowing() -> Iterator[tuple[str, int]]:
    """An address that answers no connection, as behind a firewall: its queue is full, and nobody takes from it."""
    with socket.socket() as listener, contextlib.ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            full = waiting.enter_context(socket.socket())
            full.setblocking(False)
            full.connect_ex(listener.getsockname())
        yield listener.getsockname()


def _resolve_to(*sockaddrs: tuple[str, int]) -> Callable[..., Awaitable[list[object]]]:
    async def getaddrinfo(*_: object, **__: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", each) for each in sockaddrs]

    return getaddrinfo


async def test_a_name_is_reached_by_the_address_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async with await serve(Address("127.0.0.1", 0), "server", _echo) as server:
        with _swallowing() as dead:
            answers = server.sockets[0].getsockname()
            monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", _resolve_to(dead, answers))
            channel = await connect(Address("router.example", 7001), "client")
        assert channel.peer_id == "server"
        await channel.close()


async def test_who_does_not_answer_is_said_to_have_timed_out() -> None:
    with _swallowing() as dead, pytest.raises(WorkerLost, match="timed out"):
        await connect(Address(*dead), "client", timeout_s=0.05)


async def test_nobody_there_is_a_lost_worker() -> None:
    with pytest.raises(WorkerLost, match="no connection"):
        await connect(Address("127.0.0.1", 1), "client")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "127.example.org", "example.org"])
async def test_other_machines_are_listened_to_only_with_a_secret(host: str) -> None:
    with pytest.raises(ConfigError, match="no secret is set; set --secret-file"):
        await serve(Address(host, 0), "s", _echo)


def test_loopback_is_told_by_the_address_not_by_how_it_is_spelt() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert Address(host, 1).is_loopback
    for host in ("127.evil.example", "localhost.example", "::ffff:10.0.0.1", "0.0.0.0", "", "1.127.0.1"):
        assert not Address(host, 1).is_loopback


# --- seals ------------------------------------------------------------------------------------------------


def test_a_seal_is_good_for_one_frame_at_one_place() -> None:
    ours, theirs = Seals(b"k"), Seals(b"k")
    sealed = [frame + ours.next(frame) for frame in (b"one", b"one", b"")]
    assert sealed[0] != sealed[1]
    assert [theirs.open(each, "p") for each in sealed] == [b"one", b"one", b""]


@pytest.mark.parametrize(
    "arrived",
    [
        lambda a, b: [b],  # left out
        lambda a, b: [b, a],
        lambda a, b: [a, a],
        lambda a, b: [a[:-1] + bytes([a[-1] ^ 1])],
        lambda a, b: [bytes([a[0] ^ 1]) + a[1:]],
        lambda a, b: [a + b"x"],
        lambda a, b: [b""],
        lambda a, b: [a[:15]],
    ],
)
def test_frames_that_were_tampered_with_do_not_open(arrived: Callable[[bytes, bytes], list[bytes]]) -> None:
    ours, theirs = Seals(b"k"), Seals(b"k")
    first, second = (frame + ours.next(frame) for frame in (b"first", b"second"))
    with pytest.raises(ProtocolError, match="wrong seal") as caught:
        for sealed in arrived(first, second):
            theirs.open(sealed, "p")
    assert caught.value.kind == "seal"


class _Wire:
    """Between a client and a server: every frame goes through `alter`, which gives what goes on."""

    def __init__(self, server: Address, alter: Callable[[bool, int, bytes], list[bytes]]) -> None:
        self._server = server
        self._alter = alter

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._server.host, self._server.port)
        ways = [self._copy(reader, far_writer, True), self._copy(far_reader, writer, False)]
        await asyncio.gather(*ways, return_exceptions=True)
        far_writer.close()
        writer.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to_server: bool) -> None:
        try:
            for number in itertools.count():
                size = await reader.readexactly(4)
                for frame in self._alter(to_server, number, await reader.readexactly(int.from_bytes(size, "big"))):
                    writer.write(len(frame).to_bytes(4, "big") + frame)
        finally:
            writer.close()


async def _through(alter: Callable[[bool, int, bytes], list[bytes]], refused: list[ProtocolError]) -> list[object]:
    """Three messages to an echo and back, over a wire that alters them."""
    answers: list[object] = []
    address = Address("127.0.0.1", 0)
    async with await serve(address, "s", _echo, secret=SharedSecret(b"secret"), on_refused=refused.append) as server:
        wire = _Wire(server_address(server, "127.0.0.1"), alter)
        async with await asyncio.start_server(wire.carry, "127.0.0.1", 0) as between:
            channel = await connect(server_address(between, "127.0.0.1"), "client", secret=SharedSecret(b"secret"))
            try:
                for attempt in range(3):
                    channel.send(Abort(request_id="r", attempt=attempt))
                    answers.append(decoder.decode(await channel.recv()))
            except WorkerLost:
                pass
            finally:
                channel.abort()
    return answers


HELLO_FRAMES = 1  # of each side, before what is sealed; the server's challenge comes besides


async def test_an_honest_wire_changes_nothing() -> None:
    refused: list[ProtocolError] = []
    assert len(await _through(lambda to_server, number, frame: [frame], refused)) == 3
    assert refused == []


@pytest.mark.parametrize("what", ["flip", "repeat", "inject", "drop seal"])
async def test_a_wire_that_alters_a_frame_ends_the_session(what: str) -> None:
    refused: list[ProtocolError] = []

    def alter(to_server: bool, number: int, frame: bytes) -> list[bytes]:
        if not to_server or number != HELLO_FRAMES + 1:
            return [frame]
        match what:
            case "flip":
                return [frame[:3] + bytes([frame[3] ^ 0x80]) + frame[4:]]
            case "repeat":
                return [frame, frame]
            case "inject":
                return [encode(Abort(request_id="evil", attempt=9)) + bytes(16)]
            case _:
                return [frame[:-16]]

    answers = await _through(alter, refused)
    assert len(answers) <= 2 and all(isinstance(each, Abort) and each.request_id == "r" for each in answers)
    assert [error.kind for error in refused] == ["seal"]


async def test_what_the_server_says_cannot_be_sent_back_to_it() -> None:
    refused: list[ProtocolError] = []
    seen: list[bytes] = []

    def alter(to_server: bool, number: int, frame: bytes) -> list[bytes]:
        if not to_server and number == 2:  # after challenge and welcome
            seen.append(frame)
        return [seen[0]] if to_server and number == HELLO_FRAMES + 1 else [frame]

    assert len(await _through(alter, refused)) == 1
    assert [error.kind for error in refused] == ["seal"]


async def test_a_connection_that_says_no_hello_is_told_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.wire.channel.HELLO_TIMEOUT_S", 0.05)
    refused: asyncio.Future[ProtocolError] = asyncio.get_running_loop().create_future()
    async with await serve(
        Address("127.0.0.1", 0), "s", _echo, secret=SharedSecret(b"s"), on_refused=refused.set_result
    ) as server:
        address = server_address(server, "127.0.0.1")
        _, writer = await asyncio.open_connection(address.host, address.port)
        own = Address(*writer.get_extra_info("sockname"))
        async with asyncio.timeout(60):
            error = await refused
        writer.close()
    assert str(error) == f"connecting peer {own} did not say all of a hello within 0.05 s" and error.kind == "hello"


async def test_connections_that_say_no_hello_are_bounded_and_keep_nobody_out() -> None:
    """The oldest of them goes. Else strangers who connect and wait could keep out every peer that knows the secret."""
    refused: list[ProtocolError] = []
    async with await serve(
        Address("127.0.0.1", 0), "s", _echo, secret=SharedSecret(b"s"), on_refused=refused.append
    ) as server:
        address = server_address(server, "127.0.0.1")
        silent = [await asyncio.open_connection(address.host, address.port) for _ in range(MAX_PENDING_HELLOS)]
        for reader, _ in silent:
            await reader.readexactly(4)  # its challenge: it is waited for
        assert not refused
        channel = await connect(address, "client", secret=SharedSecret(b"s"))
        assert [error.kind for error in refused] == ["flood"]
        oldest = Address(*silent[0][1].get_extra_info("sockname"))
        assert str(refused[0]).startswith(f"connecting peer {oldest} gave way")
        with contextlib.suppress(ConnectionResetError):
            await silent[0][0].read()
        _, writer = await asyncio.open_connection(address.host, address.port)  # takes the place that is free again
        message = Abort(request_id="r", attempt=3)
        channel.send(message)
        assert decoder.decode(await channel.recv()) == message, "who has proved himself stays"
        assert len(refused) == 1 and not silent[1][0].at_eof()
        channel.abort()
        for _, each in [*silent, (None, writer)]:
            each.transport.abort()


async def test_a_peer_that_reads_nothing_loses_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is sent would fill the memory."""
    monkeypatch.setattr("kvferry.wire.channel._MAX_QUEUED_BYTES", 1 << 16)
    has_sent, sent = asyncio.Event(), list[Message]()

    async def flood(channel: Channel) -> None:
        message = NoCapacity(request_id="r", attempt=0, reason="blocks", detail="x" * 4000)
        while not channel._writer.is_closing() and len(sent) < 40:
            channel.send(message)
            sent.append(message)
        has_sent.set()
        await channel.recv()

    async with await serve(Address("127.0.0.1", 0), "s", flood) as server:
        channel = await connect(server_address(server, "127.0.0.1"), "client")
        async with asyncio.timeout(60):
            await has_sent.wait()
            assert 12 < len(sent) < 20
            with pytest.raises(WorkerLost):
                await channel.recv()
        channel.abort()


async def test_what_was_said_last_is_sent_though_nobody_stays_to_send_it() -> None:
    """As why a peer is refused."""

    async def refuse(channel: Channel) -> None:
        channel.send(Drain(deadline_s=1.0))

    async with await serve(Address("127.0.0.1", 0), "s", refuse) as server:
        channel = await connect(server_address(server, "127.0.0.1"), "client")
        async with asyncio.timeout(60):
            assert decoder.decode(await channel.recv()) == Drain(deadline_s=1.0)
            with pytest.raises(WorkerLost):
                await channel.recv()
        channel.abort()


@pytest.mark.parametrize("text", ["", "host", "host:port", "host:99999", ":80"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        Address.parse(text)


def test_addresses_print_as_they_are_parsed() -> None:
    assert str(Address.parse("[::1]:80")) == "[::1]:80"
    assert Address.parse("127.0.0.9:80").is_loopback and not Address.parse("10.0.0.1:80").is_loopback
