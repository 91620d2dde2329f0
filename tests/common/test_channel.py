"""Frames cross whole or not at all, and only between those who know the secret."""

from __future__ import annotations

import asyncio

import pytest

from kvferry.common.channel import Address, Channel, connect, serve, server_address
from kvferry.common.errors import ProtocolError, WorkerLost
from kvferry.common.messages import Abort, Decoder, Drain, LiveRequests, NoCapacity

decoder: Decoder[Abort | Drain | LiveRequests] = Decoder(Abort | Drain | LiveRequests)


async def _echo(channel: Channel) -> None:
    while True:
        channel.send(decoder.decode(await channel.recv()))


async def test_messages_come_back_as_they_were_sent() -> None:
    async with await serve(Address("127.0.0.1", 0), "server", _echo, secret=b"s") as server:
        channel = await connect(server_address(server, "127.0.0.1"), "client", secret=b"s")
        message = Abort(request_id="r", attempt=3, choices=(1, 2))
        channel.send(message)
        assert decoder.decode(await channel.recv()) == message
        assert channel.peer_id == "server"
        await channel.close()


@pytest.mark.parametrize("secret", [b"", b"other"])
async def test_a_peer_without_the_secret_is_refused_with_the_reason(secret: bytes) -> None:
    refused: list[str] = []
    async with await serve(Address("127.0.0.1", 0), "s", _echo, secret=b"s", on_refused=refused.append) as server:
        with pytest.raises(ProtocolError, match="shared secret"):
            await connect(server_address(server, "127.0.0.1"), "client", secret=secret)
        await asyncio.sleep(0)
    assert refused


async def test_a_server_that_does_not_know_the_secret_is_not_believed() -> None:
    async with await serve(Address("127.0.0.1", 0), "s", _echo) as server:
        with pytest.raises(ProtocolError, match="shared secret"):
            await connect(server_address(server, "127.0.0.1"), "client", secret=b"s")


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


async def test_nobody_there_is_a_lost_worker() -> None:
    with pytest.raises(WorkerLost, match="no connection"):
        await connect(Address("127.0.0.1", 1), "client")


@pytest.mark.parametrize("text", ["", "host", "host:port", "host:99999", ":80"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        Address.parse(text)


def test_addresses_print_as_they_are_parsed() -> None:
    assert str(Address.parse("[::1]:80")) == "[::1]:80"
    assert Address.parse("127.0.0.9:80").is_loopback and not Address.parse("10.0.0.1:80").is_loopback
