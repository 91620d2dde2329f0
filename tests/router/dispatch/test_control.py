"""The control socket with real connections; the workers are scripted."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest
from structlog.testing import capture_logs

from kvferry.common.clock import Clock, SystemClock
from kvferry.common.errors import ProtocolError, WorkerLost
from kvferry.common.request import SamplingParams
from kvferry.router.dispatch.control import ControlServer
from kvferry.router.dispatch.dispatcher import Dispatcher
from kvferry.router.dispatch.worker_group import Expected, WorkerGroup, mismatch
from kvferry.router.placement.least_loaded import LeastLoaded
from kvferry.router.state.request import RouterRequest
from kvferry.router.state.worker import WorkerLink
from kvferry.tests.fake_clock import FakeClock
from kvferry.wire.address import Address
from kvferry.wire.channel import Channel, connect
from kvferry.wire.codec import Decoder, RouterToWorker
from kvferry.wire.credentials import SharedSecret
from kvferry.wire.fields import Message
from kvferry.wire.frames import DEFAULT_MAX_FRAME_BYTES, max_frame_bytes
from kvferry.wire.hello import Refused
from kvferry.wire.results import RequestTokens, StepTokens
from kvferry.wire.tasks import LocalTask, ReserveKV

from ..fleet import SPEC, config, hello, status, tokens

SECRET = b"0123456789abcdef"
CLOCK = SystemClock()
EXPECTED = Expected(version="0", model="m", max_model_len=1024)


class WatchedDispatcher(Dispatcher):
    """Wakes the test at each event."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(config(), LeastLoaded(), clock)
        self.changed = asyncio.Event()
        self.num_ticks = self.num_left = 0

    def tick(self) -> None:
        super().tick()
        self.num_ticks += 1
        self.changed.set()

    def on_message(self, link: WorkerLink, message: Message) -> None:
        super().on_message(link, message)
        self.changed.set()

    def worker_left(self, link: WorkerLink, reason: str) -> None:
        super().worker_left(link, reason)
        self.num_left += 1
        self.changed.set()


@dataclass
class Router:
    dispatcher: WatchedDispatcher
    server: ControlServer
    address: Address
    channels: list[Channel] = field(default_factory=list)

    async def connect(self, worker_id: str) -> Worker:
        self.channels.append(await connect(self.address, worker_id, secret=SharedSecret(SECRET)))
        return Worker(self.channels[-1])

    async def join(self, worker_id: str, **changes: object) -> Worker:
        role = "prefill" if worker_id.startswith("p") else "decode"
        worker = await self.connect(worker_id)
        worker.channel.send(hello(worker_id, role, **changes))
        worker.channel.send(status())
        return worker

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                self.dispatcher.changed.clear()
                await self.dispatcher.changed.wait()

    def ids(self) -> list[str]:
        return sorted(worker.worker_id for worker in self.dispatcher.view().workers if worker.is_ready)


class Worker:
    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._decoder: Decoder[Message] = Decoder(RouterToWorker)

    async def recv(self) -> Message:
        async with asyncio.timeout(60):
            return self._decoder.decode(await self.channel.recv())


@asynccontextmanager
async def router(expected: Expected = EXPECTED, clock: Clock = CLOCK) -> AsyncIterator[Router]:
    dispatcher = WatchedDispatcher(clock)
    server = ControlServer(
        [WorkerGroup(expected, dispatcher)], router_id="r-0", secret=SharedSecret(SECRET), clock=clock
    )
    address = await server.start(Address("127.0.0.1", 0))
    running = Router(dispatcher, server, address)
    try:
        yield running
    finally:
        await server.close()
        for channel in running.channels:
            await channel.close()


async def test_a_request_is_served_over_real_sockets() -> None:
    async with router() as r:
        decode = await r.join("d-0")
        await r.until(lambda: r.ids() == ["d-0"])
        stream = r.dispatcher.submit(RouterRequest("r-0", [1, 2, 3], SamplingParams(max_tokens=2)))
        task = await decode.recv()
        assert isinstance(task, LocalTask) and task.spec.prompt_token_ids() == [1, 2, 3]
        update = RequestTokens("r-0", 0, (tokens(0, 0, 2, "length"),))
        decode.channel.send(StepTokens(updates=(update,)))
        received = [update async for update in stream]
        assert received[-1].finish == "length" and sum(len(update.tokens) for update in received) == 2


async def test_a_worker_whose_hello_does_not_arrive_is_named_with_what_it_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a way that loses large packets: the first, small messages pass."""
    monkeypatch.setattr("kvferry.router.dispatch.control.HELLO_TIMEOUT_S", 0.05)
    with capture_logs() as logs:
        async with router() as running:
            worker = await running.connect("d-0")
            with pytest.raises(WorkerLost):
                await worker.recv()
    refusals = [entry["reason"] for entry in logs if entry["event"] == "worker_refused"]
    assert len(refusals) == 1
    assert re.match(r"d-0 is connected and said no WorkerHello within 0.05 s: .*MTU", refusals[0])


async def test_both_workers_are_asked() -> None:
    async with router() as r:
        prefill, decode = await r.join("p-0"), await r.join("d-0")
        await r.until(lambda: r.ids() == ["d-0", "p-0"])
        assert r.dispatcher.ready() == []
        stream = r.dispatcher.submit(RouterRequest("r-0", [1, 2, 3], SamplingParams()))
        assert isinstance(await decode.recv(), ReserveKV)
        stream.abort()
        prefill.channel.abort()
        await r.until(lambda: r.ids() == ["d-0"])


async def test_a_worker_whose_connection_ends_is_lost_at_once() -> None:
    async with router() as r:
        first, second = await r.join("d-0"), await r.join("d-1")
        await r.until(lambda: len(r.ids()) == 2)
        r.dispatcher.submit(RouterRequest("r-0", [1, 2, 3], SamplingParams()))
        assert isinstance(await first.recv(), LocalTask)
        first.channel.abort()
        task = await second.recv()
        assert isinstance(task, LocalTask) and task.spec.attempt == 1


async def test_a_new_life_of_a_worker_ends_the_older_session() -> None:
    async with router() as r:
        old = await r.join("d-0", incarnation=1)
        await r.until(lambda: r.ids() == ["d-0"])
        await r.join("d-0", incarnation=2)
        with pytest.raises(WorkerLost):
            await old.recv()
        await r.until(lambda: [w.hello.incarnation for w in r.dispatcher.view().workers] == [2])


async def test_the_end_of_a_replaced_session_is_not_the_newer_ones() -> None:
    async with router() as r:
        await r.join("d-0", incarnation=1)
        await r.until(lambda: r.ids() == ["d-0"])
        newer = await r.join("d-0", incarnation=2)
        await r.until(lambda: r.ids() == ["d-0"] and r.dispatcher.num_left == 2)  # once replaced, once closed
        await r.server.close()
        with pytest.raises(WorkerLost):
            await newer.recv()


async def test_the_only_worker_may_come_back_with_another_cache() -> None:
    async with router() as r:
        await r.join("d-0", incarnation=1)
        await r.until(lambda: r.ids() == ["d-0"])
        await r.join("d-0", incarnation=2, spec=msgspec.structs.replace(SPEC, block_size=32))
        await r.until(lambda: [w.hello.spec.block_size for w in r.dispatcher.view().workers] == [32])


async def test_two_workers_of_one_name_do_not_end_each_other_for_ever() -> None:
    async with router() as r:
        await r.join("d-0", incarnation=1)
        await r.until(lambda: r.ids() == ["d-0"])
        later = await r.join("d-0", incarnation=2)
        await r.until(lambda: [w.hello.incarnation for w in r.dispatcher.view().workers] == [2])
        answer = await (await r.join("d-0", incarnation=1)).recv()
        assert isinstance(answer, Refused) and "worker id 'd-0' is another worker's" in answer.reason
        later.channel.abort()
        await r.until(lambda: r.ids() == [])
        await r.join("d-0", incarnation=2)
        await r.until(lambda: r.ids() == ["d-0"])


async def test_a_worker_that_does_not_fit_is_told_both_values() -> None:
    async with router() as r:
        stranger = await r.join("d-0", model="another")
        answer = await stranger.recv()
        assert isinstance(answer, Refused) and "'another'" in answer.reason and "'m'" in answer.reason
        with pytest.raises(WorkerLost):
            await stranger.recv()
        assert r.dispatcher.view().workers == ()


async def test_a_worker_must_be_who_its_connection_is() -> None:
    async with router() as r:
        worker = await r.connect("d-0")
        worker.channel.send(hello("d-1", "decode"))
        assert isinstance(await worker.recv(), Refused)


async def test_without_the_secret_nobody_joins() -> None:
    async with router() as r:
        with pytest.raises(ProtocolError, match="secret"):
            await connect(r.address, "d-0", secret=SharedSecret(b"another secret here"))


@pytest.mark.parametrize("first", [True, False])
async def test_a_frame_that_is_no_message_ends_the_session(first: bool) -> None:
    async with router() as r:
        if first:
            worker = await r.connect("d-0")
        else:
            worker = await r.join("d-0")
            await r.until(lambda: r.ids() == ["d-0"])
        worker.channel.send(Alien(text="x"))
        with pytest.raises(WorkerLost):
            await worker.recv()
        assert r.ids() == []


async def test_a_message_before_the_hello_ends_the_session() -> None:
    async with router() as r:
        worker = await r.connect("d-0")
        worker.channel.send(status())
        with pytest.raises(WorkerLost):
            await worker.recv()


async def test_closing_ends_every_session_and_the_wait() -> None:
    async with router() as r:
        worker = await r.join("d-0")
        await r.until(lambda: r.ids() == ["d-0"])
        waiting = asyncio.ensure_future(r.server.wait())
        await r.server.close()
        await waiting
        with pytest.raises(WorkerLost):
            await worker.recv()


class Alien(Message, frozen=True):
    text: str


def test_a_fitting_worker_is_welcome() -> None:
    assert mismatch(hello("d-0", "decode"), EXPECTED, hello("p-0", "prefill")) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "9"}, ["version '9'", "router's '0'"]),
        ({"max_model_len": 99}, ["99", "1024"]),
        ({"spec": msgspec.structs.replace(SPEC, results="kernels-1")}, ["deterministic True", "router's False"]),
        ({"spec": msgspec.structs.replace(SPEC, model="other")}, ["weights 'other'", "worker p-0's 'm'"]),
        (
            {"spec": msgspec.structs.replace(SPEC, model="other"), "quantization": "int4"},
            ["quantization 'int4'", "worker p-0's ''"],
        ),
        ({"spec": msgspec.structs.replace(SPEC, draft="d")}, ["draft model 'd'", "worker p-0's ''"]),
        ({"spec": msgspec.structs.replace(SPEC, block_size=32)}, ["KV cache", "block_size=32", "block_size=16", "p-0"]),
    ],
)
def test_a_mismatch_names_both_values(changes: dict[str, object], words: list[str]) -> None:
    text = mismatch(hello("d-0", "decode", **changes), EXPECTED, hello("p-0", "prefill"))
    assert all(word in text for word in words), text


def test_a_role_that_does_not_exist_is_refused() -> None:
    assert "'cook'" in mismatch(hello("d-0", "cook"), EXPECTED, None)


def test_without_an_expectation_workers_must_agree_with_each_other() -> None:
    free = Expected(version="0", model="m")
    longer = hello("d-0", "decode", max_model_len=2048)
    assert mismatch(longer, free, None) == ""
    assert "worker p-0's 1024" in mismatch(longer, free, hello("p-0", "prefill"))


def test_a_frame_holds_the_longest_prompt_with_all_its_choices() -> None:
    assert max_frame_bytes(1024) == DEFAULT_MAX_FRAME_BYTES
    assert max_frame_bytes(131072) > 131072 * 4 * 17


async def test_workers_are_not_lost_by_a_standstill_of_their_router() -> None:
    clock = FakeClock()
    async with router(clock=clock) as r:
        await r.join("d-0")
        await r.until(lambda: r.ids() == ["d-0"])
        await r.until(lambda: r.dispatcher.num_ticks > 0)
        clock.advance(600.0)  # as of a suspended machine: the worker stood still as well
        seen = r.dispatcher.num_ticks
        await r.until(lambda: r.dispatcher.num_ticks > seen + 1)
        assert r.ids() == ["d-0"]
