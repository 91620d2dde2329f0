"""Real workers that are told another role again and again, in the middle of prompts, handoffs and answers."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from kvferry import __version__
from kvferry.common.clock import SystemClock
from kvferry.common.request import SamplingParams
from kvferry.common.router_config import RouterConfig
from kvferry.router.dispatch.control import ControlServer
from kvferry.router.dispatch.dispatcher import Dispatcher
from kvferry.router.dispatch.worker_group import Expected, WorkerGroup
from kvferry.router.placement.least_loaded import LeastLoaded
from kvferry.router.state.request import RequestStatus, RouterRequest
from kvferry.router.state.views import WorkerView
from kvferry.router.state.worker import WorkerLink
from kvferry.tools.load.tiny_model import write_tiny_model
from kvferry.wire.address import Address
from kvferry.wire.fields import Message

from ..forks import Fork
from .cluster import FORKS
from .forked_command import NAME

ROLES = {"w-0": "prefill", "w-1": "decode", "w-2": "decode"}
FLAGS = (
    *("--served-model-name", "tiny", "--insecure-loopback", "--deterministic"),
    *("--kv-cache-memory-bytes", "8MiB", "--num-threads", "1"),
)
NUM_TOKENS = 60
START_S, WAIT_S = 60.0, 40.0


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def ask(number: int) -> RouterRequest:
    """No prefix cache knows its prompt: it has to be computed and shipped, or computed where it is answered."""
    prompt = [(number * 37 + 5 * i * i + 3 * i) % 400 + 4 for i in range(40 + 60 * (number % 5))]
    sampling = SamplingParams(temperature=0.8 * (number % 2), seed=number, max_tokens=NUM_TOKENS, ignore_eos=True)
    salt = uuid.uuid4().bytes
    return RouterRequest(uuid.uuid4().hex, prompt, sampling, n=1 + number % 3 // 2, cache_salt=salt)


class WatchedDispatcher(Dispatcher):
    """Wakes the test at each event."""

    def __init__(self, model_dir: Path) -> None:
        config = RouterConfig(model_dir=model_dir, served_model_name="tiny", deterministic=True)
        super().__init__(config, LeastLoaded(), SystemClock())
        self.changed = asyncio.Event()

    def on_message(self, link: WorkerLink, message: Message) -> None:
        super().on_message(link, message)
        self.changed.set()


@dataclass
class Fleet:
    """A router in this process, its workers in others."""

    dispatcher: WatchedDispatcher
    log: Path

    def worker(self, name: str) -> WorkerView | None:
        return next((view for view in self.dispatcher.view().workers if view.worker_id == name), None)

    async def until(self, condition: object, what: str, limit_s: float = WAIT_S) -> None:
        assert callable(condition)
        try:
            async with asyncio.timeout(limit_s):
                while not condition():
                    self.dispatcher.changed.clear()
                    await self.dispatcher.changed.wait()
        except TimeoutError:
            raise AssertionError(f"{what} did not come true\n{self.log.read_text()[-3000:]}") from None

    async def answer(self, number: int) -> list[list[int]]:
        request = ask(number)
        async for _ in self.dispatcher.submit(request):
            pass
        assert request.status is RequestStatus.FINISHED and request.num_failures == 0
        return [[token.token_id for token in choice.tokens] for choice in request.choices]

    async def set_role(self, name: str, role: str) -> float:
        """Seconds until the router hears it."""
        began = time.perf_counter()
        assert self.dispatcher.set_role(name, role)
        await self.until(lambda: (view := self.worker(name)) is not None and view.role == role, f"{name} as {role}")
        return time.perf_counter() - began


@contextlib.asynccontextmanager
async def serving(model_dir: Path, log: Path, *flags: str) -> AsyncIterator[Fleet]:
    dispatcher = WatchedDispatcher(model_dir)
    expected = Expected(version=__version__, model="tiny", max_model_len=None, deterministic=True)
    control = ControlServer([WorkerGroup(expected, dispatcher)], router_id="router-test")
    address = await control.start(Address("127.0.0.1", 0))
    fleet = Fleet(dispatcher, log)
    processes: list[Fork] = []
    with log.open("wb") as output:
        try:
            for name, role in ROLES.items():
                command = [sys.executable, "-m", NAME, role, str(model_dir), "--worker-id", name]
                command += ["--router", str(address), *FLAGS, *flags]
                start = partial(FORKS.Popen, command, stdout=output, stderr=FORKS.STDOUT)
                processes.append(await asyncio.to_thread(start))
            for name in ROLES:
                await fleet.until(lambda name=name: (v := fleet.worker(name)) and v.is_ready, name, START_S)
            yield fleet
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            await asyncio.gather(*(asyncio.to_thread(process.wait) for process in processes))
            await control.close()


def is_at_rest(view: WorkerView | None) -> bool:
    status = view.status if view is not None else None
    return status is not None and (
        status.num_running == status.num_waiting == status.num_granted_blocks == status.num_quarantined_blocks == 0
        and status.num_free_blocks == status.num_blocks
    )


async def flip_under_load(fleet: Fleet, num_flips: int) -> None:
    """Answers go on and on while roles change; each change comes when some answers have ended since the one before."""
    expected = [await fleet.answer(number) for number in range(6)]
    num_done, is_over = 0, False

    async def client(number: int) -> None:
        nonlocal num_done
        while not is_over:
            assert await fleet.answer(number) == expected[number], f"answer {number}"
            num_done += 1

    async with asyncio.TaskGroup() as clients:
        for number in range(len(expected)):
            clients.create_task(client(number))
        times = []
        for flip in range(num_flips):
            name = ("w-0", "w-1")[flip % 2]
            role = "decode" if (view := fleet.worker(name)) is not None and view.role == "prefill" else "prefill"
            times.append(await fleet.set_role(name, role))
            seen = num_done
            await fleet.until(lambda seen=seen: num_done >= seen + 4, f"4 answers after {seen}")
        is_over = True
    print(f"{num_done} answers; roles changed within {1e3 * max(times):.1f} ms")
    assert not fleet.dispatcher.breaches()
    for name in ROLES:
        await fleet.until(lambda name=name: is_at_rest(fleet.worker(name)), f"{name} is at rest")


async def test_roles_change_back_and_forth_under_load_and_every_answer_is_as_without(
    model_dir: Path, tmp_path: Path
) -> None:
    async with serving(model_dir, tmp_path / "log") as fleet:
        assert {view.role for view in fleet.dispatcher.view().workers} == {"prefill", "decode"}
        await flip_under_load(fleet, 8)
        hello = fleet.worker("w-0")
        assert hello is not None and hello.hello.can_change_role and hello.hello.samples
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
async def test_so_do_those_of_workers_with_two_ranks(model_dir: Path, tmp_path: Path) -> None:
    async with serving(model_dir, tmp_path / "log", "--tensor-parallel-size", "2") as fleet:
        await flip_under_load(fleet, 4)
