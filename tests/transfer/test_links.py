"""The control sockets of handoffs."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from kvferry.common.errors import ConfigError, WorkerLost
from kvferry.tools.load.server_process import free_port
from kvferry.transfer.links import MAX_FRAME_BYTES, KVLinks, KVServer
from kvferry.transfer.send.leases import MAX_OPENS
from kvferry.wire.codec import encode
from kvferry.wire.credentials import SharedSecret
from kvferry.wire.grants import GrantId
from kvferry.wire.handoff import KVRenew, KVRenewed


async def test_a_port_that_is_taken_meanwhile_is_told_as_a_setting() -> None:
    """A worker looks at it before it loads, and listens behind that."""
    servers = [KVServer(name, SharedSecret(b"x" * 32), lambda *_: None, lambda *_: None) for name in ("d-0", "d-1")]
    address = await servers[0].start("127.0.0.1", 0)
    try:
        with pytest.raises(ConfigError, match=f"handoff_port: cannot listen on {address}: .*already in use"):
            await servers[1].start(address.host, address.port)
    finally:
        await servers[0].close()


@pytest.mark.parametrize("reason", ["", "rank 1 ended"])
async def test_a_link_whose_end_cannot_be_told_is_logged(reason: str) -> None:
    """Nobody listens there, so that it ends at once."""
    lost: list[str] = []

    def on_lost(kv_address: str) -> None:
        lost.append(kv_address)
        if reason:
            raise WorkerLost(reason)

    address = f"127.0.0.1:{free_port()}"
    links = KVLinks("p-0", SharedSecret(b"x" * 32), lambda *_: None, on_lost)
    with capture_logs() as logs:
        links.send(address, KVRenew(opens=()))
        await asyncio.wait(links._tasks, timeout=20.0)
        await asyncio.sleep(0)  # what is called back then
    assert lost == [address]
    told = [line["error"] for line in logs if line["event"] == "kv_link_failed"]
    assert told == ([f"WorkerLost: {reason}"] if reason else [])


async def test_a_worker_that_cannot_be_reached_is_told_once_and_why() -> None:
    """Routers see no more than that nobody opened a grant in time."""
    address = f"127.0.0.1:{free_port()}"
    links = KVLinks("p-0", SharedSecret(b"x" * 32), lambda *_: None, lambda _: None)
    with capture_logs() as logs:
        for _ in range(2):
            links.send(address, KVRenew(opens=()))
            await asyncio.wait(links._tasks, timeout=20.0)
    [told] = [line for line in logs if line["log_level"] == "warning"]
    assert (told["event"], told["peer"]) == ("kv_link_not_made", address)
    assert f"no connection to {address}: " in told["detail"]


async def test_a_peer_that_is_refused_is_told_once_for_each_reason() -> None:
    """A prefill worker with another secret, and one that says what no prefill worker says."""
    lost: list[str] = []
    server = KVServer("d-0", SharedSecret(b"x" * 32), lambda *_: None, lost.append)
    address = str(await server.start("127.0.0.1", 0))
    strangers = KVLinks("p-0", SharedSecret(b"y" * 32), lambda *_: None, lambda _: None)
    known = KVLinks("p-1", SharedSecret(b"x" * 32), lambda *_: None, lambda _: None)
    with capture_logs() as logs:
        for links, message in ((strangers, KVRenew(opens=())), (known, KVRenewed(opens=()))):
            for _ in range(2):
                links.send(address, message)
                await asyncio.wait(links._tasks, timeout=20.0)
    await server.close()
    refused = [line for line in logs if line["event"] == "kv_peer_refused"]
    assert [(line["log_level"], line["peer"], line["reason"]) for line in refused] == [
        ("warning", "unknown", "secret"),
        ("debug", "unknown", "secret"),
        ("warning", "p-1", "frame"),
        ("debug", "p-1", "frame"),
    ]
    assert "shared secret" in refused[0]["detail"] and "KVRenewed" in refused[2]["detail"]
    assert lost == ["p-1#1", "p-1#2"]


_TOO_LARGE = KVRenewed(opens=tuple((GrantId("d" * 250, 1, number), number, 1.0) for number in range(2000)))


async def test_a_message_over_the_bound_ends_its_connection_at_both_ends() -> None:
    """Whoever waits for it learns that it is lost; the other connections go on."""
    secret, lost, heard = SharedSecret(b"x" * 32), asyncio.Event(), asyncio.Event()
    sessions: list[str] = []
    gone: asyncio.Queue[str] = asyncio.Queue()

    def on_message(session: str, _: object) -> None:
        sessions.append(session)
        heard.set()

    server = KVServer("d-0", secret, on_message, gone.put_nowait)
    address = str(await server.start("127.0.0.1", 0))
    links = KVLinks("p-0", secret, lambda *_: None, lambda _: lost.set())
    with capture_logs() as logs:
        for is_server in (True, False):
            heard.clear()
            lost.clear()
            links.send(address, KVRenew(opens=()))
            async with asyncio.timeout(20.0):
                await heard.wait()
                if is_server:
                    server.send(sessions[-1], _TOO_LARGE)
                else:
                    links.send(address, _TOO_LARGE)
                await lost.wait()
                assert await gone.get() == sessions[-1]
    await links.close()
    await server.close()
    told = [(line["peer"], line["log_level"]) for line in logs if line["event"] == "message_too_large"]
    assert told == [("p-0", "error"), ("d-0", "error")] and sessions == ["p-0#1", "p-0#2"]


def test_the_answer_to_all_opens_that_are_asked_for_at_once_fits() -> None:
    grant_id = GrantId("\N{OX}" * 256, 2**53, 2**53)
    assert len(encode(KVRenewed(opens=((grant_id, 2**63 - 1, 3.0),) * MAX_OPENS))) < MAX_FRAME_BYTES
