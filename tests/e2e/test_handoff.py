"""The KV crosses processes, whole and only where it is missing; and what happens when it cannot."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvferry.common.config import EngineConfig, WorkerConfig
from kvferry.common.request import SamplingParams
from kvferry.tools.load.server_process import free_port

from ..checkpoints import write_checkpoint
from ..engine_driver import Driver, make_engine
from .cluster import Cluster, run_all, serve, wait_until
from .forked_command import NAME as FORKED_COMMAND

COMMON = ("--served-model-name", "tiny", "--dtype", "float32")
BROKEN_TRANSPORT = Path(__file__).parent / "broken_transport.py"
FORK_SERVER = "kvferry.launch.forking.server"
BLOCK_SIZE = 16
BLOCK_BYTES = 2 * 2 * 2 * 16 * BLOCK_SIZE * 4  # layers, K and V, heads, head_dim, tokens, float32
POOL_BYTES = 2100 * BLOCK_BYTES


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", max_model_len=40960)


@pytest.fixture(scope="module")
def cluster(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    log = tmp_path_factory.mktemp("cluster") / "log"
    with serve(model_dir, log, *COMMON, "--kv-cache-memory-bytes", str(POOL_BYTES), is_fork=False) as cluster:
        yield cluster


def _complete(cluster: Cluster, prompt: list[int], **more: object) -> dict[str, object]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **more}
    return cluster.post("/v1/completions", body)


def _tokens(first: int, count: int) -> list[int]:
    return [(first + 3 * i * i + i) % 500 + 4 for i in range(count)]


class Wire:
    """What was sent since the start, by our own count and by NIXL's."""

    names = ("kvferry_kv_transfer_bytes_sum", "kvferry_wire_bytes_total")

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._before = dict[str, float]()
        wait_until(self._stands_still, "an end of what earlier tests sent")

    def _stands_still(self) -> bool:
        """Reports of transfers come behind the answers: those of the tests before may still be on their way."""
        last, self._before = self._before, {name: self._cluster.metric(name) for name in self.names}
        time.sleep(0.5)
        return self._before == last

    def wait_for(self, expected: int) -> None:
        for name, before in self._before.items():
            total = before + expected
            wait_until(lambda name=name, total=total: self._cluster.metric(name) == total, f"{name} = {total}")


def test_bytes_on_the_wire_are_the_blocks_that_the_decode_worker_lacks(cluster: Cluster) -> None:
    shared = _tokens(1, 80)
    requests = [
        (_tokens(7, 100), 7),  # six whole blocks and a partial one, which goes whole
        (_tokens(9, 64), 4),
        (_tokens(11, 1), 1),
        (shared, 5),
        (shared + _tokens(13, 30), 2),  # five blocks are known over there
    ]
    wire, expected = Wire(cluster), 0
    for prompt, num_blocks in requests:
        _complete(cluster, prompt)
        expected += num_blocks * BLOCK_BYTES
        wire.wait_for(expected)


def test_what_no_window_reaches_is_not_sent(tmp_path: Path) -> None:
    """The answers are those of one engine that never sent anything, a next turn's too."""
    model_dir = write_checkpoint(tmp_path / "model", "gemma3_text", max_model_len=4096)
    alone = Driver(make_engine(model_dir, 256, deterministic=True))
    page_bytes, sampling = BLOCK_BYTES // 2, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    with serve(model_dir, tmp_path / "log", *COMMON, "--deterministic", "--no-local-prefill") as cluster:
        wire, prompt = Wire(cluster), _tokens(7, 1500)
        expected = 0
        # Two of three layers have a window of 20: 19 tokens, a tile of 256, and 256 before the prompt's end.
        for num_blocks, num_thin in ((94, (1500 - 531) // 16), (103 - 96, 0)):
            [tokens] = alone.generate([alone.add(prompt, sampling)])
            answer = _complete(cluster, prompt, max_tokens=40, return_tokens_as_token_ids=True, logprobs=0)
            choices: Any = answer["choices"]
            assert choices[0]["logprobs"]["tokens"] == [f"token_id:{token}" for token in tokens]
            expected += (3 * num_blocks - 2 * num_thin) * page_bytes
            wire.wait_for(expected)
            prompt = [*prompt, *tokens, *_tokens(13, 100)]


def test_whole_numbers_are_handed_over_with_their_scales(model_dir: Path, tmp_path: Path) -> None:
    """The answer is that of one engine that never sent anything."""
    alone = Driver(make_engine(model_dir, kv_cache_dtype="int8", deterministic=True))
    flags = ("--kv-cache-dtype", "int8", "--deterministic", "--no-local-prefill")
    with serve(model_dir, tmp_path / "log", *COMMON, *flags) as cluster:
        wire, expected = Wire(cluster), 0
        for prompt, num_blocks in ((_tokens(7, 100), 7), (_tokens(9, 300), 19)):
            sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
            seq = alone.add(prompt, sampling)
            tokens = alone.generate([seq])[0]
            answer = _complete(cluster, prompt, max_tokens=20, return_tokens_as_token_ids=True, logprobs=0)
            choices: Any = answer["choices"]
            assert choices[0]["logprobs"]["tokens"] == [f"token_id:{token}" for token in tokens]
            expected += num_blocks * (BLOCK_BYTES // 4) * 20 // 16  # a byte each, and four for each 16 numbers
            wire.wait_for(expected)


def test_a_prompt_of_32000_tokens_is_handed_over_behind_its_computation(cluster: Cluster) -> None:
    def total(name: str) -> float:
        return cluster.metric(f"kvferry_{name}_seconds_sum")

    wire, workers = Wire(cluster), cluster.children("kvferry.worker")
    exposed, ttft = total("kv_transfer_exposed"), total("time_to_first_token")
    _complete(cluster, _tokens(3, 600))
    before = {worker.pid: worker.memory_info().rss for worker in workers}
    _complete(cluster, _tokens(5, 32_000))
    wire.wait_for((38 + 2000) * BLOCK_BYTES)
    for worker in workers:  # the pool is touched page by page; beyond it scratch, and heaps that glibc keeps of it
        assert worker.memory_info().rss - before[worker.pid] < POOL_BYTES + (512 << 20)
    for state in ("active", "granted", "quarantined"):
        wait_until(lambda state=state: cluster.metric("kvferry_blocks", f'state="{state}"') == 0, f"no block {state}")
    assert total("kv_transfer_exposed") - exposed < 0.05 * (total("time_to_first_token") - ttft)


def test_a_killed_worker_is_back_and_the_stream_is_whole(cluster: Cluster) -> None:
    prompt = _tokens(15, 100)
    expected = _complete(cluster, prompt, max_tokens=24)["choices"]
    for role in ("prefill", "decode"):
        with _replaced(cluster, role):
            assert _complete(cluster, prompt, max_tokens=24)["choices"] == expected


def test_a_deployment_whose_fork_server_is_killed_serves_and_heals(cluster: Cluster) -> None:
    """Nobody notices until a worker is to be started; then there is another one."""
    prompt = _tokens(17, 100)
    expected = _complete(cluster, prompt, max_tokens=24)["choices"]
    [first] = cluster.children(FORK_SERVER)
    first.send_signal(signal.SIGKILL)
    assert _complete(cluster, prompt, max_tokens=24)["choices"] == expected
    for role in ("decode", "prefill"):  # of the lost one, and then of the new one
        with _replaced(cluster, role):
            assert _complete(cluster, prompt, max_tokens=24)["choices"] == expected
    [second] = cluster.children(FORK_SERVER)
    assert second.pid != first.pid
    assert _complete(cluster, prompt, max_tokens=24)["choices"] == expected


@contextlib.contextmanager
def _replaced(cluster: Cluster, role: str) -> Iterator[None]:
    """Kill the only worker of a role before the block; after it another one has taken its place."""

    def pid() -> int | None:
        [worker] = [each for each in cluster.status()["processes"] if each["role"] == role]
        return int(worker["pid"]) if worker["state"] == "ready" else None

    victim = pid()
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    yield
    wait_until(lambda: pid() not in (None, victim), f"a new {role} worker")
    wait_until(lambda: cluster.client.get("/ready").status_code == 200, "readiness")


@contextlib.contextmanager
def _by_hand(model_dir: Path, log: Path, *router_flags: str) -> Iterator[Cluster]:
    """Router, decode and prefill worker, each started by its own command; the prefill worker's transport is broken."""
    http, control = free_port(), free_port()
    address = f"127.0.0.1:{control}"
    engine = EngineConfig(
        model_dir=model_dir, served_model_name="tiny", dtype="float32", num_threads=1, kv_cache_memory_bytes=16 << 20
    )
    broken = WorkerConfig(worker_id="p-unplugged", role="prefill", engine=engine, routers=(address,))
    shared = [str(model_dir), "--served-model-name", "tiny", "--insecure-loopback"]
    router = [*shared, "--port", str(http), "--control-port", str(control), *router_flags]
    decode = [*shared, "--router", address, "--kv-cache-memory-bytes", "16MiB", "--dtype", "float32"]
    commands = [
        [sys.executable, "-m", FORKED_COMMAND, "router", *router],
        [sys.executable, "-m", FORKED_COMMAND, "decode", *decode],
        [sys.executable, str(BROKEN_TRANSPORT), "--config-json", broken.model_dump_json()],
    ]
    with run_all(commands, log, f"http://127.0.0.1:{http}") as cluster:
        yield cluster


def test_without_a_transport_the_answer_comes_from_a_local_prefill_and_says_so(model_dir: Path, tmp_path: Path) -> None:
    with _by_hand(model_dir, tmp_path / "log") as cluster:
        answer = _complete(cluster, _tokens(7, 100))
        assert answer["usage"]["completion_tokens"] == 4  # type: ignore[index]  # JSON
        assert cluster.metric("kvferry_fallback_total") == 1
        assert "local_prefill_fallback" in cluster.log.read_text()


def test_without_a_transport_and_without_local_prefill_the_error_names_the_peer(
    model_dir: Path, tmp_path: Path
) -> None:
    with _by_hand(model_dir, tmp_path / "log", "--no-local-prefill") as cluster:
        body = {"model": "tiny", "prompt": _tokens(7, 100), "max_tokens": 4}
        answer = cluster.client.post("/v1/completions", json=body)
        assert answer.status_code in (500, 503)
        error = answer.json()["error"]
        assert (
            "p-unplugged" in error["message"] and "link is down" in error["message"] and error["type"] and error["code"]
        )
        assert cluster.metric("kvferry_fallback_total") == 0


def test_nothing_outlives_a_server_that_gets_sigkill(model_dir: Path, tmp_path: Path) -> None:
    shared_memory = set(os.listdir("/dev/shm"))
    log = tmp_path / "log"
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess), serve(model_dir, log, *COMMON) as cluster:
        children = cluster.children()
        pids = {child.pid for child in children}
        assert len(pids) >= 4  # router, its renderer of chats, prefill worker, decode worker
        _complete(cluster, _tokens(7, 100))
        cluster.process.kill()
        cluster.process.wait()
        _, alive = psutil.wait_procs(children, timeout=10.0)
        assert not alive
    assert set(os.listdir("/dev/shm")) <= shared_memory
