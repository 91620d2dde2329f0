"""Everything is restarted under load, one process at a time, and no client notices more than a pause.

The clients try nothing twice: `openai` over connections that it keeps, `httpx` over a new one for each request.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai import AsyncOpenAI

from kvferry.benchmarks.restart.load import Ask, Cut, Tally, asking, keep_asking, undisturbed
from kvferry.common.config import FAILPOINTS_VARIABLE, SECRET_VARIABLE
from kvferry.tools.chaos.programs import program_name

from ..checkpoints import write_checkpoint
from .cluster import FORKS, Cluster, serve, wait_until
from .forked_command import NAME

MODEL = "tiny"
NUM_TOKENS = 48
LONG_TOKENS = 800  # take some seconds as steps are SLOW: longer than a drain may last
SLOW = {FAILPOINTS_VARIABLE: "decode.step=slow@*"}  # by waiting, not by computing
PROMPTS = [f"{'The router places each request. ' * (1 + n % 3)}{n}" for n in range(9)]
FLAGS = ("--served-model-name", MODEL, "--dtype", "float32", "--kv-cache-memory-bytes", "16MiB")
LIMIT_S = 240.0
PAUSE_S = 0.1  # of each client: two cores have to start processes meanwhile, which is what the test waits for
SECRET = "known to all of its processes"


def openai_asking(client: AsyncOpenAI) -> Ask:
    async def ask(prompt: str) -> AsyncIterator[str]:
        try:
            stream = await client.completions.create(
                model=MODEL,
                prompt=prompt,
                max_tokens=NUM_TOKENS,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            finish = None
            async for chunk in stream:
                finish = chunk.choices[0].finish_reason
                yield chunk.choices[0].text
        except openai.OpenAIError as error:
            raise Cut(str(error)) from error
        if finish != "length":
            raise Cut(f"the stream ended with {finish}")

    return ask


async def _under_load(cluster: Cluster, command: Callable[[], object]) -> Tally:
    """What clients see while the command runs."""
    tally = Tally()
    client = AsyncOpenAI(base_url=f"{cluster.base_url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S)
    async with client:
        asks = (openai_asking(client), asking(cluster.base_url, MODEL, NUM_TOKENS))
        wanted = await undisturbed(asks[0], PROMPTS)
        done = asyncio.Event()
        async with asyncio.TaskGroup() as clients:
            for number in range(4):
                clients.create_task(keep_asking(asks[number % 2], wanted, number, done, tally, pause_s=PAUSE_S))
            try:
                await asyncio.to_thread(command)
            finally:
                done.set()
    return tally


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose running answers have time to end."""
    folder = tmp_path_factory.mktemp("patient")
    flags = (*FLAGS, "--prefill", "2", "--decode", "2", "--routers", "2")
    with serve(
        write_checkpoint(folder / MODEL, max_model_len=2 * LONG_TOKENS), folder / "log", *flags, env=SLOW
    ) as cluster:
        yield cluster


@pytest.mark.slow
def test_a_rolling_restart_of_everything_fails_no_request(patient: Cluster) -> None:
    before = _program_pids(patient)
    tally = asyncio.run(_under_load(patient, lambda: patient.command("restart")))
    assert tally.failures == []
    assert tally.num_requests > 20
    after = _program_pids(patient)
    assert sorted(before) == sorted(after) == ["d-0", "d-1", "p-0", "p-1", "router"]
    assert all(len(pids) == (2 if name == "router" else 1) for name, pids in after.items())
    assert not any(before[name] & after[name] for name in before)


@pytest.mark.slow
def test_sigterm_lets_a_running_answer_end_and_then_ends_everything(patient: Cluster) -> None:
    with _long_stream(patient) as stream:
        pieces = stream.pieces()
        text = next(pieces)
        patient.process.send_signal(signal.SIGTERM)
        text += "".join(pieces)
    assert text
    assert patient.process.wait(LIMIT_S) == 0


def _program_pids(cluster: Cluster) -> dict[str, set[int]]:
    """The processes that run now, by worker id; routers under one name."""
    pids: dict[str, set[int]] = {}
    for child in cluster.programs():
        name = program_name(child) or ""
        pids.setdefault("router" if name.startswith("router") else name, set()).add(child.pid)
    return pids


# --- one process at a time ----------------------------------------------------------------------------------


@dataclass
class Site:
    """A cluster whose processes are hit one by one while a long stream runs."""

    cluster: Cluster
    admin_urls: list[str]  # of each router
    wanted: str

    def workers(self) -> dict[str, dict[str, Any]]:
        return self._seen_by(self.admin_urls[0])

    def _seen_by(self, admin_url: str) -> dict[str, dict[str, Any]]:
        shown = httpx.get(f"{admin_url}/admin/workers", timeout=LIMIT_S).json()["workers"]
        return {worker["worker_id"]: worker for worker in shown}

    def decoding(self) -> tuple[str, int]:
        """Name and process of the worker that the only stream runs on."""
        wait_until(self._busy, "a heartbeat that tells of the stream")
        [found] = self._busy()
        return found["worker_id"], int(found["pid"])

    def _busy(self) -> list[dict[str, Any]]:
        return [w for w in self.workers().values() if w["role"] == "decode" and w["load"]["running"]]

    def num_retries(self) -> Counter[str]:
        """By reason, of both routers."""
        counts = Counter[str]()
        for url in self.admin_urls:
            for line in httpx.get(f"{url}/admin/metrics", timeout=LIMIT_S).text.splitlines():
                if found := re.match(r'kvferry_retries_total\{.*reason="(\w+)".*\} (\S+)', line):
                    counts[found[1]] += int(float(found[2]))
        return counts

    def is_whole(self) -> bool:
        """Every router has every worker."""
        seen = [self._seen_by(url) for url in self.admin_urls]
        states = [[worker["state"] for worker in workers.values()] for workers in seen]
        return states == [["ready"] * 4] * 2

    def wait_until_whole(self) -> None:
        wait_until(self.is_whole, "four ready workers")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    flags = (*FLAGS, "--prefill", "2", "--decode", "2", "--routers", "2", "--drain-timeout", "1", "--admin-port", "0")
    model_dir = write_checkpoint(folder / MODEL, max_model_len=2 * LONG_TOKENS)
    with serve(model_dir, folder / "log", *flags, env=SLOW | {SECRET_VARIABLE: SECRET}) as cluster:
        with _long_stream(cluster) as stream:
            wanted = "".join(stream.pieces())
        yield Site(cluster, cluster.admin_urls, wanted)


@dataclass
class LongStream:
    """An answer of some seconds, read over a connection of its own."""

    response: httpx.Response

    def pieces(self) -> Iterator[str]:
        is_done = False
        for line in self.response.iter_lines():
            is_done = is_done or line == "data: [DONE]"
            if line and not is_done:
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                yield event["choices"][0]["text"]
        assert is_done


@contextmanager
def _long_stream(cluster: Cluster) -> Iterator[LongStream]:
    body = {
        "model": MODEL,
        "prompt": PROMPTS[0],
        "max_tokens": LONG_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.Client(base_url=cluster.base_url, timeout=LIMIT_S) as client:
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            assert response.status_code == 200
            yield LongStream(response)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("numbers", "why", "reason"),
    [
        ((signal.SIGTERM,), "exit code 0", "drained"),
        ((signal.SIGTERM, signal.SIGTERM), "exit code 0", "drained"),
        ((signal.SIGTERM, signal.SIGKILL), "ended by SIGKILL", "worker_lost"),
        ((signal.SIGSTOP,), "no sign of life for 3", "worker_lost"),
    ],
    ids=["drained", "told to end while it drains", "killed while it drains", "hung"],
)
def test_a_stream_outlives_its_decode_worker(
    site: Site, numbers: tuple[signal.Signals, ...], why: str, reason: str
) -> None:
    """A drain's limit is shorter than the stream; one that hangs is killed, as its writes must be over.

    Who ends by itself says goodbye, and nobody has failed; who dies while it drains is lost like any other.
    """
    site.wait_until_whole()
    before = site.num_retries()
    with _long_stream(site.cluster) as stream:
        pieces = stream.pieces()
        text = next(pieces)
        name, pid = site.decoding()
        first, *more = numbers
        os.kill(pid, first)
        for number in more:
            wait_until(lambda: site.workers()[name]["state"] == "draining", "the drain is known")
            os.kill(pid, number)
        text += "".join(pieces)
    assert text == site.wanted
    wait_until(lambda: f"{name}: {why}" in site.cluster.log.read_text(), f"the end of {name} is told")
    assert not psutil.pid_exists(pid)
    assert site.num_retries() - before == {reason: 1}


@pytest.mark.slow
def test_a_worker_is_drained_through_the_admin_listener_and_started_again(site: Site) -> None:
    site.wait_until_whole()
    before = site.workers()["p-0"]["pid"]
    assert httpx.get(f"{site.cluster.base_url}/admin/workers").status_code == 404
    assert httpx.post(f"{site.admin_urls[0]}/admin/workers/p-0/drain").status_code == 202
    wait_until(lambda: not psutil.pid_exists(before), "the end of p-0")
    site.wait_until_whole()
    assert site.workers()["p-0"]["pid"] != before


@pytest.mark.slow
def test_workers_let_go_of_a_router_that_was_killed(site: Site) -> None:
    site.wait_until_whole()
    with _long_stream(site.cluster) as stream:
        pieces = stream.pieces()
        next(pieces)
        site.decoding()
        _, port = stream.response.extensions["network_stream"].get_extra_info("client_addr")
        os.kill(_router_of(site.cluster, port), signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            list(pieces)
    answer = httpx.post(f"{site.cluster.base_url}/v1/completions", json={"prompt": "hi", "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    wait_until(lambda: not any(_num_held(worker) for worker in site.workers().values()), "free blocks")
    site.wait_until_whole()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes_byte", "flags", "secret", "why"),
    [
        (
            MODEL,
            False,
            ("--block-size", "32"),
            SECRET,
            "KV cache .* of worker d-9 is not .*'s .*block_size=32.*block_size=16",
        ),
        (MODEL, True, (), SECRET, "weights '[0-9a-f]{32}' of worker d-9 is not worker .*'s '[0-9a-f]{32}'"),
        ("another", False, (), SECRET, "model 'another' of worker d-9 is not the router's 'tiny'"),
        (MODEL, False, (), "another secret of some length", "wrong or missing shared secret"),
    ],
    ids=["layout", "weights", "model", "secret"],
)
def test_a_worker_that_does_not_fit_is_refused(
    site: Site, tmp_path: Path, name: str, changes_byte: bool, flags: tuple[str, ...], secret: str, why: str
) -> None:
    """It ends with exit code 2 and a line that says both values; the cluster goes on."""
    site.wait_until_whole()
    log = site.cluster.log.read_text()
    control = json.loads(next(line for line in log.splitlines() if '"router_ready"' in line))["control"]
    model_dir = write_checkpoint(tmp_path / "model", max_model_len=2 * LONG_TOKENS)
    if changes_byte:
        _change_one_byte(model_dir / "model.safetensors")
    command = [sys.executable, "-m", NAME, "decode", str(model_dir), "--router", control, "--worker-id", "d-9"]
    command += ["--served-model-name", name, "--dtype", "float32", "--kv-cache-memory-bytes", "16MiB", *flags]
    env, log_of_it = {**os.environ, SECRET_VARIABLE: secret}, tmp_path / "log"
    with log_of_it.open("wb") as output:
        process = FORKS.Popen(command, env=env, stdout=output, stderr=FORKS.STDOUT)
    try:
        assert process.wait(LIMIT_S) == 2, log_of_it.read_text()
    finally:
        process.kill()
    assert re.search(why, log_of_it.read_text())
    assert site.is_whole()
    metrics = "".join(httpx.get(f"{url}/admin/metrics").text for url in site.admin_urls)
    assert re.search(r"^kvferry_handshake_rejects_total\{.*\} [1-9]", metrics, re.MULTILINE)


def _change_one_byte(path: Path) -> None:
    """Of a weight in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _router_of(cluster: Cluster, port: int) -> int:
    """The router that has the connection of this client's port."""
    for pid in _program_pids(cluster)["router"]:
        connections = psutil.Process(pid).net_connections("tcp4")
        if any(connection.raddr and connection.raddr.port == port for connection in connections):
            return pid
    raise AssertionError(f"no router has a connection with port {port}")


def _num_held(worker: dict[str, Any]) -> int:
    """Blocks that a request or a handoff holds; those that are only cached count as free."""
    blocks = worker["blocks"]
    return int(blocks["total"] - blocks["free"])
