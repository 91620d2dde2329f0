"""A prefix that lies on another worker is read from there, and every token is as if it had been computed.

Real worker processes; the router is this test's own, so that it says who computes what and who reads from whom.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Literal

import pytest
import pytest_asyncio

from kvferry import __version__
from kvferry.common.clock import SystemClock
from kvferry.common.config import FAILPOINTS_VARIABLE, EngineConfig, TransferConfig, WorkerConfig
from kvferry.common.request import SamplingParams
from kvferry.common.router_config import RouterConfig
from kvferry.launch.forking import ForkedProcess, ForkServer
from kvferry.router.dispatch.control import ControlServer
from kvferry.router.dispatch.dispatcher import Dispatcher
from kvferry.router.dispatch.worker_group import Expected, WorkerGroup
from kvferry.router.state.demand import Demand, Lack, Placement, Reason, Wait
from kvferry.router.state.request import RouterRequest
from kvferry.router.state.views import PoolView, WorkerView
from kvferry.router.state.worker import RouterWorker
from kvferry.wire.address import Address
from kvferry.wire.workers import WorkerStatus

from ..checkpoints import write_checkpoint
from . import reference
from .cluster import FORKS, UCX_FORKS
from .forked_command import forking

WORKER = "kvferry.worker"
NUM_TOKENS = 20
BLOCK_SIZE = 16
BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # layers, K and V, heads, head_dim, tokens, float32
PROMPT = [(7 * i * i + 13 * i + 5) % 500 + 4 for i in range(600)]
_numbers = count()

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


class Fixed:
    """Places every request where the test says."""

    name = "fixed"
    predicts = False

    def __init__(self) -> None:
        self.placement: Placement | None = None

    def place(self, view: PoolView, demand: Demand) -> Placement | Wait:
        assert self.placement is not None
        names = {worker.worker_id for worker in view.workers if worker.is_ready}
        wanted = {self.placement.decode_worker, self.placement.prefill_worker} - {None}
        return self.placement if wanted <= names else Wait(Lack.DECODE_WORKER)

    def prefill_for(self, view: PoolView, demand: Demand, decode_session: int) -> WorkerView | None:
        return None


@dataclass
class Fleet:
    dispatcher: Dispatcher
    policy: Fixed
    failpoints: Path  # a file that may come later
    processes: dict[str, ForkedProcess] = field(default_factory=dict)
    ends: dict[str, asyncio.Task[int | None]] = field(default_factory=dict)  # exit codes

    def worker(self, worker_id: str) -> RouterWorker:
        found = self.dispatcher._pools.named(worker_id)
        assert found is not None, worker_id
        return found

    def status(self, worker_id: str) -> WorkerStatus:
        status = self.worker(worker_id).status
        assert status is not None
        return status

    async def ask(
        self, prompt: list[int], decode: str, *, prefill: str | None = None, source: str | None = None
    ) -> tuple[list[int], int]:
        """The answer's tokens, and how many of the prompt's came from a cache."""
        self.policy.placement = Placement(prefill, decode, Reason.HANDOFF, fetch_from=source)
        sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        request = RouterRequest(f"q-{next(_numbers)}", list(prompt), sampling)
        tokens: list[int] = []
        async for update in self.dispatcher.submit(request):
            tokens += [token.token_id for token in update.tokens]
        return tokens, request.num_cached_tokens

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        async with asyncio.timeout(60):
            while not condition():
                ended = [name for name, end in self.ends.items() if end.done() and end.result() != -signal.SIGKILL]
                assert not ended, f"{what}: {ended} ended"
                await asyncio.sleep(0.02)

    def holds(self, worker_id: str, tokens: list[int]) -> bool:
        """By what the worker has told, it has the KV of all full blocks of these tokens."""
        request = RouterRequest("", list(tokens), SamplingParams())
        from kvferry.router.dispatch.prefix_fetch import hash_prompt

        hash_prompt(self.dispatcher._pools, request)
        found = self.dispatcher._pools.prefix_index.match(request.block_hashes)
        return found.get(self.worker(worker_id).link.number) == len(request.block_hashes)


@asynccontextmanager
async def fleet(model: Path, folder: Path, backend: Literal["nixl", "ucx"], *names: str) -> AsyncIterator[Fleet]:
    """A router in this process, and workers in theirs, which are forks as a launcher's are."""
    policy = Fixed()
    config = RouterConfig(model_dir=model, served_model_name="tiny")
    dispatcher = Dispatcher(config, policy, SystemClock())
    group = WorkerGroup(Expected(version=__version__, model="tiny"), dispatcher)
    server = ControlServer([group], router_id="r-0")
    address = await server.start(Address("127.0.0.1", 0))
    running = Fleet(dispatcher, policy, folder / "failpoints")
    env = {**os.environ, FAILPOINTS_VARIABLE: f"@{running.failpoints}", "OMP_NUM_THREADS": "1"}
    engine = EngineConfig(
        model_dir=model, served_model_name="tiny", dtype="float32", num_threads=1, kv_cache_memory_bytes=8 << 20
    )
    forks = ForkServer(env, {WORKER: ("kvferry.worker.process", "kvferry.worker.build", "kvferry.worker.worker")})
    with (folder / "log").open("wb") as output, pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "create_subprocess_exec", forking(UCX_FORKS if backend == "ucx" else FORKS))
        for name in names:
            worker = WorkerConfig(
                worker_id=name,
                role="prefill" if name.startswith("p") else "decode",
                engine=engine,
                transfer=TransferConfig(backend=backend),
                routers=(str(address),),
                log_level="warning",
            )
            argv = [sys.executable, "-m", WORKER, "--config-json", worker.model_dump_json()]
            process = await forks.start(argv, {}, env, output.fileno(), f"{WORKER} {name}")
            running.processes[name], running.ends[name] = process, asyncio.create_task(process.wait())
        try:
            await running.until(lambda: len(dispatcher.view().workers) == len(names), "all workers join")
            await running.until(lambda: all(worker.is_ready for worker in dispatcher.view().workers), "all are ready")
            yield running
        finally:
            for process in running.processes.values():
                with suppress(ProcessLookupError):  # it has ended
                    process.send_signal(signal.SIGCONT)
                    process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                await asyncio.gather(*running.ends.values())
            await forks.close()
            await server.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "llama", max_model_len=2048)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    """Two prefill and two decode workers that move KV by the backend that is asked for."""
    pytest.importorskip("ucxx" if request.param == "ucx" else "nixl_cu12", exc_type=ImportError)
    async with fleet(model, tmp_path_factory.mktemp("fleet"), request.param, "p-0", "p-1", "d-0", "d-1") as opened:
        yield opened


async def _greedy(model: Path, prompts: list[list[int]]) -> list[reference.Reference]:
    """Beside the router, which heeds its workers meanwhile."""
    return await asyncio.to_thread(reference.greedy, model, prompts, NUM_TOKENS)


@pytest.mark.parametrize("running", ["nixl", "ucx"], indirect=True)
async def test_a_second_turn_reads_the_first_turns_kv_from_wherever_it_lies(running: Fleet, model: Path) -> None:
    [first] = await _greedy(model, [PROMPT])
    second_prompt = PROMPT + first.tokens + [(11 * i + 3) % 500 + 4 for i in range(40)]
    [second] = await _greedy(model, [second_prompt])
    tokens, num_cached = await running.ask(PROMPT, "d-0", prefill="p-0")
    assert (tokens, num_cached) == (first.tokens, 0)
    known = PROMPT + first.tokens[:-1]  # the last one's KV was never needed
    num_known = len(known) // BLOCK_SIZE * BLOCK_SIZE
    await running.until(lambda: running.holds("d-0", known), "d-0 tells of its answer's blocks")
    await running.until(lambda: running.holds("p-0", PROMPT), "p-0 tells of the prompt's blocks")

    # from a decode worker, to a prefill worker that has none of it
    tokens, num_cached = await running.ask(second_prompt, "d-1", prefill="p-1", source="d-0")
    assert (tokens, num_cached) == (second.tokens, num_known)
    await running.until(lambda: running.status("p-1").fetched_bytes > 0, "a heartbeat of p-1")
    assert (running.status("p-1").num_fetches, running.status("p-1").failed_fetches) == (1, 0)
    assert running.status("p-1").fetched_bytes == num_known // BLOCK_SIZE * BLOCK_BYTES

    # from a prefill worker, to a decode worker that computes the prompt itself and holds its first block
    other = PROMPT[:16] + PROMPT[300:540]
    expected, longer = await _greedy(model, [other, [*other, 9, 8, 7]])
    assert (await running.ask(other, "d-0", prefill="p-0"))[0] == expected.tokens
    await running.until(lambda: running.holds("p-0", other), "p-0 tells of the other prompt")
    tokens, num_cached = await running.ask([*other, 9, 8, 7], "d-1", source="p-0")
    assert num_cached == len(other)
    assert tokens == longer.tokens
    await running.until(lambda: running.status("d-1").fetched_bytes > 0, "a heartbeat of d-1")
    assert running.status("d-1").fetched_bytes == (len(other) - 16) // BLOCK_SIZE * BLOCK_BYTES


@pytest.mark.parametrize("running", ["nixl"], indirect=True)
async def test_a_source_that_dies_or_hangs_costs_time_and_nothing_else(running: Fleet, model: Path) -> None:
    prompt = [(11 * i * i + 5 * i + 3) % 500 + 4 for i in range(600)]  # no cache knows it
    tails = [[n, 5, 6] for n in (7, 8)]
    expected = await _greedy(model, [prompt, *(prompt + tail for tail in tails)])
    num_fetched = running.status("p-1").fetched_bytes
    running.failpoints.write_text("d-0/fetch.lent=kill")
    assert (await running.ask(prompt, "d-0", prefill="p-0"))[0] == expected[0].tokens
    await running.until(lambda: running.holds("d-0", prompt), "d-0 tells of the prompt")
    await running.until(lambda: running.holds("p-0", prompt), "p-0 tells of it")

    running.processes["p-0"].send_signal(signal.SIGSTOP)
    tokens, num_cached = await running.ask(prompt + tails[0], "d-1", source="p-0")
    running.processes["p-0"].send_signal(signal.SIGCONT)
    assert (tokens, num_cached) == (expected[1].tokens, 0)
    await running.until(lambda: running.status("d-1").failed_fetches == 1, "a heartbeat of d-1")

    tokens, num_cached = await running.ask(prompt + tails[1], "d-1", prefill="p-1", source="d-0")
    assert (tokens, num_cached) == (expected[2].tokens, 0)
    await running.until(lambda: running.status("p-1").failed_fetches == 1, "a heartbeat of p-1")
    assert running.status("p-1").fetched_bytes == num_fetched
    async with asyncio.timeout(5):
        assert await running.ends["d-0"] == -signal.SIGKILL
