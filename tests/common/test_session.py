"""A worker's heartbeats: each router gets its own."""

from __future__ import annotations

import asyncio

from kvferry.common.channel import Address, Channel, serve, server_address
from kvferry.common.credentials import NO_SECRET
from kvferry.common.messages import Decoder, WorkerHello, WorkerStatus, WorkerToRouter
from kvferry.common.session import RouterSessions
from kvferry.tests.router.fleet import hello, status

_decoder: Decoder[WorkerHello | WorkerStatus] = Decoder(WorkerToRouter)


async def test_each_router_gets_the_heartbeat_that_is_made_for_it() -> None:
    heard: dict[str, list[str]] = {"a": [], "b": []}
    is_done = asyncio.Event()

    async def listen(name: str) -> tuple[asyncio.Server, str]:
        async def on_channel(channel: Channel) -> None:
            assert isinstance(_decoder.decode(await channel.recv()), WorkerHello)
            while True:
                message = _decoder.decode(await channel.recv())
                assert isinstance(message, WorkerStatus)
                heard[name].append(message.state)
                if all(len(states) >= 2 for states in heard.values()):
                    is_done.set()
                elif len(heard[name]) == 1:
                    sessions.send_status()

        server = await serve(Address("127.0.0.1", 0), name, on_channel)
        return server, str(server_address(server, "127.0.0.1"))

    servers = [await listen(name) for name in heard]
    sessions = RouterSessions(
        tuple(address for _, address in servers),
        hello("w", "decode"),
        secret=NO_SECRET,
        max_frame_bytes=1 << 20,
        on_message=lambda router, message: None,
        on_lost=lambda router: None,
        status=lambda router: status(state=f"for {router}"),
    )
    sessions.start()
    async with asyncio.timeout(10):
        await is_done.wait()
    await sessions.close()
    for server, _ in servers:
        server.close()
    assert {name: set(states) for name, states in heard.items()} == {"a": {"for a"}, "b": {"for b"}}
