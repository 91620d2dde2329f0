"""A worker's sessions: each router gets its own heartbeats, and what was sent is written before what comes after."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from kvferry.common.errors import InvalidTransition, ProtocolError, WorkerLost
from kvferry.common.request import SampledToken
from kvferry.tools.load.server_process import free_port
from kvferry.wire.address import Address
from kvferry.wire.channel import Channel, connect, serve, server_address
from kvferry.wire.codec import Decoder, WorkerToRouter, encode
from kvferry.wire.credentials import NO_SECRET, SharedSecret
from kvferry.wire.fields import Message
from kvferry.wire.hello import Refused
from kvferry.wire.results import ChoiceTokens, HandoffDone, PromptLogprobs, RequestTokens, StepTokens
from kvferry.wire.workers import Drain, Goodbye, WorkerHello, WorkerStatus
from kvferry.worker.sessions import RouterSessions

from ..router.fleet import hello, status

_decoder: Decoder[WorkerHello | WorkerStatus] = Decoder(WorkerToRouter)


def _not_expected(error: BaseException) -> None:
    raise AssertionError from error


def _sessions(
    *addresses: str,
    on_message: Callable[[str, Message], None] = lambda router, message: None,
    on_failure: Callable[[BaseException], None] = _not_expected,
    on_joined: Callable[[str], None] = lambda router: None,
) -> RouterSessions:
    return RouterSessions(
        addresses,
        hello("w", "decode"),
        secret=NO_SECRET,
        max_frame_bytes=1 << 20,
        on_message=on_message,
        on_lost=lambda router: None,
        status=lambda router: status(),
        on_failure=on_failure,
        on_joined=on_joined,
    )


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
        on_failure=_not_expected,
    )
    sessions.start()
    async with asyncio.timeout(60):
        await is_done.wait()
    await sessions.close()
    for server, _ in servers:
        server.close()
    assert {name: set(states) for name, states in heard.items()} == {"a": {"for a"}, "b": {"for b"}}


async def test_what_the_loop_is_asked_for_after_a_message_finds_it_written() -> None:
    """In the kernel's hands, so that it outlives this process: a step that may be the last one waits for that."""
    loop, joined, looked = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    found: list[int] = []

    async def on_channel(channel: Channel) -> None:
        for _ in range(2):  # hello and first heartbeat: from here on nothing is under way
            await channel.recv()
        accepted = channel._writer.get_extra_info("socket").fileno()

        def look() -> None:
            with (
                socket.fromfd(accepted, socket.AF_INET, socket.SOCK_STREAM) as peer,
                contextlib.suppress(BlockingIOError),
            ):
                found.append(len(peer.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT)))
            looked.set()

        sessions.send("r", HandoffDone(request_id="a", attempt=0))
        sessions.send("r", HandoffDone(request_id="b", attempt=0))
        loop.call_soon_threadsafe(look)
        await looked.wait()
        joined.set()

    server = await serve(Address("127.0.0.1", 0), "r", on_channel)
    sessions = _sessions(str(server_address(server, "127.0.0.1")))
    sessions.start()
    async with asyncio.timeout(60):
        await joined.wait()
    await sessions.close()
    server.close()
    size = 4 + len(encode(HandoffDone(request_id="a", attempt=0)))
    assert found == [2 * size]


async def test_a_message_that_cannot_be_dealt_with_is_told_and_not_the_silent_end_of_a_session() -> None:
    """Kept and awaited by nobody, the session's task would end in silence, and its router miss the worker for good."""
    failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def on_channel(channel: Channel) -> None:
        channel.send(Drain(deadline_s=1.0))
        channel.flush()
        await failed

    def odd(router: str, message: object) -> None:
        raise InvalidTransition("from nowhere")

    server = await serve(Address("127.0.0.1", 0), "r", on_channel)
    sessions = _sessions(str(server_address(server, "127.0.0.1")), on_message=odd, on_failure=failed.set_result)
    sessions.start()
    async with asyncio.timeout(10):
        assert isinstance(await failed, InvalidTransition)
    await sessions.close()
    server.close()


async def test_a_router_that_is_named_by_two_addresses_has_one_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the older one at each hello, and the worker open that again, for ever."""
    monkeypatch.setattr("kvferry.worker.sessions._BACKOFF_S", (0.0,))
    num_hellos, num_left, is_left = 0, 0, asyncio.Event()

    async def on_channel(channel: Channel) -> None:
        nonlocal num_hellos, num_left
        try:
            message = _decoder.decode(await channel.recv())
        except WorkerLost:
            num_left += 1
            if num_left == 3:
                is_left.set()
            return
        assert isinstance(message, WorkerHello)
        num_hellos += 1
        if num_hellos > 1:
            is_left.set()
        with contextlib.suppress(WorkerLost):
            while True:
                await channel.recv()

    server = await serve(Address("127.0.0.1", 0), "r", on_channel)
    port = server_address(server, "127.0.0.1").port
    with capture_logs() as logs:
        sessions = _sessions(f"127.0.0.1:{port}", f"localhost:{port}")
        sessions.start()
        async with asyncio.timeout(60):
            await is_left.wait()
        await sessions.close()
    server.close()
    assert num_hellos == 1 and [line["event"] for line in logs].count("router_named_twice") == 1


async def test_a_router_that_cannot_be_reached_is_told_once_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a worker with a wrong address says that it is ready, and nothing more for ever."""
    num_tries, tried_often = 0, asyncio.Event()

    async def count(address: Address, own_id: str, *, secret: SharedSecret, max_frame_bytes: int) -> Channel:
        nonlocal num_tries
        num_tries += 1
        if num_tries == 4:
            tried_often.set()
        return await connect(address, own_id, secret=secret, max_frame_bytes=max_frame_bytes)

    monkeypatch.setattr("kvferry.worker.sessions.connect", count)
    monkeypatch.setattr("kvferry.worker.sessions.ROUTER_GONE_S", 0.0)
    address = f"127.0.0.1:{free_port()}"
    with capture_logs() as logs:
        sessions = _sessions(address)
        sessions.start()
        async with asyncio.timeout(60):
            await tried_often.wait()
        await sessions.close()
    [told] = [line for line in logs if line["event"] == "router_unreached"]
    assert told["log_level"] == "warning" and told["router"] == address
    assert f"no connection to {address}: " in told["reason"]


async def test_each_time_that_a_router_cannot_be_reached_is_told_and_tried_as_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_told: list[int] = []  # before each try
    is_over = asyncio.Event()

    async def try_it(address: Address, own_id: str, *, secret: SharedSecret, max_frame_bytes: int) -> Channel:
        num_told.append(sum(line["log_level"] == "warning" for line in logs))
        if len(num_told) == 3:  # a session that its router ends at once
            return await connect(address, own_id, secret=secret, max_frame_bytes=max_frame_bytes)
        if len(num_told) == 6:
            is_over.set()
        raise WorkerLost("no connection")

    async def on_channel(channel: Channel) -> None:
        await channel.recv()

    monkeypatch.setattr("kvferry.worker.sessions.connect", try_it)
    monkeypatch.setattr("kvferry.worker.sessions.ROUTER_GONE_S", 0.0)
    monkeypatch.setattr("kvferry.worker.sessions._BACKOFF_S", (0.0, 0.0, 0.0, 600.0))  # from the third failure on
    server = await serve(Address("127.0.0.1", 0), "r", on_channel)
    with capture_logs() as logs:
        sessions = _sessions(str(server_address(server, "127.0.0.1")))
        sessions.start()
        async with asyncio.timeout(60):
            await is_over.wait()
        await sessions.close()
    server.close()
    told = [line["event"] for line in logs if line["log_level"] == "warning"]
    assert told == ["router_unreached", "router_session_ended", "router_unreached"]
    assert num_told == [0, 0, 1, 2, 2, 3], "one that is only late is no trouble"


async def test_whom_a_router_refuses_does_not_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.worker.sessions._BACKOFF_S", (0.0,))

    async def on_channel(channel: Channel) -> None:
        await channel.recv()
        channel.send(Refused(reason="another model"))
        channel.flush()

    servers = [await serve(Address("127.0.0.1", 0), name, on_channel) for name in ("a", "b")]
    sessions = _sessions(*(str(server_address(server, "127.0.0.1")) for server in servers))
    sessions.start()
    async with asyncio.timeout(60):
        await asyncio.gather(*sessions._tasks)
    assert (await sessions.refused).endswith(": another model")
    await sessions.close()
    for server in servers:
        server.close()


async def test_a_router_that_cannot_be_agreed_with_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(address: Address, own_id: str, *, secret: SharedSecret, max_frame_bytes: int) -> Channel:
        raise ProtocolError("another secret")

    monkeypatch.setattr("kvferry.worker.sessions.connect", refuse)
    sessions = _sessions("127.0.0.1:1")
    sessions.start()
    async with asyncio.timeout(60):
        await asyncio.gather(*sessions._tasks)
    assert await sessions.refused == "router 127.0.0.1:1: another secret"
    await sessions.close()


async def test_a_message_that_makes_no_sense_ends_its_session_and_no_worker() -> None:
    num_sessions, is_back = 0, asyncio.Event()

    async def on_channel(channel: Channel) -> None:
        nonlocal num_sessions
        num_sessions += 1
        if num_sessions == 2:
            is_back.set()
        channel.send(Drain(deadline_s=1.0))
        with contextlib.suppress(WorkerLost):
            while True:
                await channel.recv()

    def odd(router: str, message: object) -> None:
        raise ProtocolError("no role")

    server = await serve(Address("127.0.0.1", 0), "r", on_channel)
    with capture_logs() as logs:
        sessions = _sessions(str(server_address(server, "127.0.0.1")), on_message=odd)
        sessions.start()
        async with asyncio.timeout(60):
            await is_back.wait()
        await sessions.close()
    server.close()
    assert "no role" in [line.get("error") for line in logs if line["event"] == "router_session_refused"]


async def test_every_router_hears_all_that_was_sent_and_the_goodbye() -> None:
    heard: dict[str, list[Message]] = {"a": [], "b": []}
    joined: list[str] = []
    have_joined, are_told = asyncio.Event(), asyncio.Event()

    async def listen(name: str) -> asyncio.Server:
        async def on_channel(channel: Channel) -> None:
            with contextlib.suppress(WorkerLost):
                while True:
                    heard[name].append(_decoder.decode(await channel.recv()))
                    for event, num_messages in ((have_joined, 2), (are_told, 4)):
                        if all(len(messages) == num_messages for messages in heard.values()):
                            event.set()

        return await serve(Address("127.0.0.1", 0), name, on_channel)

    servers = [await listen(name) for name in heard]
    sessions = _sessions(*(str(server_address(server, "127.0.0.1")) for server in servers), on_joined=joined.append)
    sessions.start()
    last = HandoffDone(request_id="last", attempt=0)
    async with asyncio.timeout(60):
        await have_joined.wait()
        for name in heard:
            sessions.send(name, last)
        sessions.say_goodbye()
        await sessions.close()
        await are_told.wait()
    for server in servers:
        server.close()
    assert sorted(joined) == ["a", "b"]
    assert all(messages[2:] == [last, Goodbye()] for messages in heard.values())


async def _heard(sent: list[tuple[str, Message]]) -> tuple[list[list[Message]], list[MutableMapping[str, Any]]]:
    """What a router hears, session by session, of what a worker sends at once, and what the worker logs."""
    heard: list[list[Message]] = []
    is_done = asyncio.Event()

    async def on_channel(channel: Channel) -> None:
        heard.append([])
        for _ in range(2):  # hello and first heartbeat
            await channel.recv()
        if len(heard) == 1:
            for router, message in sent:
                sessions.send(router, message)
        sessions.send("r", HandoffDone(request_id="last", attempt=0))
        while True:
            heard[-1].append(_decoder.decode(await channel.recv()))
            if heard[-1][-1] == HandoffDone(request_id="last", attempt=0):
                is_done.set()

    with capture_logs() as logs:
        server = await serve(Address("127.0.0.1", 0), "r", on_channel)
        sessions = _sessions(str(server_address(server, "127.0.0.1")))
        sessions.start()
        async with asyncio.timeout(60):
            await is_done.wait()
        await sessions.close()
        server.close()
    return heard, logs


async def test_the_tokens_of_a_step_come_whole_however_large_they_are() -> None:
    """Those of many requests with log-probabilities. A last token that was lost would never come again."""
    token = SampledToken(150_000, -1.2, tuple((150_000 + place, -2.5) for place in range(20)))
    updates = tuple(RequestTokens(f"r-{number}", 1, (ChoiceTokens(0, 9, (token,) * 17),)) for number in range(900))
    assert len(encode(StepTokens(updates=updates))) > 3 << 20
    [messages], _ = await _heard([("r", StepTokens(updates=updates))])
    *steps, last = messages
    assert isinstance(last, HandoffDone) and len(steps) > 2
    parts = [step for step in steps if isinstance(step, StepTokens)]
    assert sum((step.updates for step in parts), ()) == updates
    assert [step.is_rest for step in parts] == [False] + [True] * (len(parts) - 1)


@pytest.mark.parametrize(
    "too_large",
    [
        PromptLogprobs(request_id="x" * (1 << 20), attempt=0, start=0, tokens=()),
        StepTokens(updates=(RequestTokens("x" * (1 << 20), 0, ()),)),
    ],
    ids=["whole", "one part"],
)
async def test_a_message_that_is_too_large_ends_its_session_and_no_other_message_vanishes(too_large: Message) -> None:
    """Its router learns of the loss, and has the request go on."""
    heard, logs = await _heard(
        [("elsewhere", too_large), ("r", too_large), ("r", HandoffDone(request_id="a", attempt=0))]
    )
    assert heard == [[], [HandoffDone(request_id="last", attempt=0)]]
    [told] = [line for line in logs if line["event"] == "message_too_large"]
    assert told["log_level"] == "error" and told["router"] == "r"
    assert f"{type(too_large).__name__} of" in told["error"]


async def test_the_requests_of_a_router_that_is_back_in_time_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    is_back = asyncio.Event()
    timers: list[asyncio.TimerHandle] = []

    async def note(address: Address, own_id: str, *, secret: SharedSecret, max_frame_bytes: int) -> Channel:
        timers.extend(sessions._lost_timers.values())
        return await connect(address, own_id, secret=secret, max_frame_bytes=max_frame_bytes)

    async def on_channel(channel: Channel) -> None:
        await channel.recv()
        if timers:  # not the first session, which ends at once
            is_back.set()
            await asyncio.Event().wait()

    monkeypatch.setattr("kvferry.worker.sessions.connect", note)
    server = await serve(Address("127.0.0.1", 0), "r", on_channel)
    sessions = _sessions(str(server_address(server, "127.0.0.1")))
    sessions.start()
    async with asyncio.timeout(60):
        await is_back.wait()
    [timer] = timers
    assert timer.cancelled(), "it would end them all"
    await sessions.close()
    server.close()
