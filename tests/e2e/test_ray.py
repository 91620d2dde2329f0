"""The same workers as actors on a Ray cluster of two nodes on this machine."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from ..checkpoints import write_checkpoint
from . import reference
from .cluster import Cluster, serve, wait_until


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """Two nodes of two cores; workers are spread over them."""
    from ray.cluster_utils import Cluster as RayCluster

    nodes = RayCluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    try:
        yield str(nodes.address)
    finally:
        nodes.shutdown()


async def _answer(cluster: Cluster, references: list[reference.Reference]) -> list[list[int]]:
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=120.0) as client:

        async def one(wanted: reference.Reference) -> list[int]:
            body = {"model": "tiny", "prompt": wanted.prompt, "max_tokens": len(wanted.tokens), "temperature": 0}
            answer = await client.post("/v1/completions", json={**body, "ignore_eos": True, "return_token_ids": True})
            assert answer.status_code == 200, answer.text
            tokens: list[int] = answer.json()["choices"][0]["token_ids"]
            return tokens

        return list(await asyncio.gather(*map(one, references)))


@pytest.mark.slow
def test_two_nodes_answer_the_same_and_a_killed_actor_comes_back(ray_address: str, tmp_path: Path) -> None:
    model_dir = write_checkpoint(tmp_path / "tiny")
    prompts = [[(7 * i * i + n) % 500 + 4 for i in range(50 * n)] for n in range(1, 5)]
    references = reference.greedy(model_dir, prompts, 12)
    flags = ["--served-model-name", "tiny", "--dtype", "float32", "--kv-cache-memory-bytes", "16MiB"]
    flags += ["--launcher", "ray", "--ray-address", ray_address]
    with serve(model_dir, tmp_path / "log", *flags) as cluster:
        reference.assert_equal(asyncio.run(_answer(cluster, references)), references, "ray")
        wait_until(lambda: cluster.metric("kvferry_kv_transfer_bytes_count") == len(references), "every report")
        assert cluster.metric("kvferry_fallback_total") == 0
        for worker in ("p-0", "d-0"):
            [pid] = _actor_pids(cluster, worker)
            psutil.Process(pid).send_signal(signal.SIGKILL)
            wait_until(
                lambda worker=worker, old=pid: _actor_pids(cluster, worker) not in ([], [old]), f"a new {worker}", 60
            )
            wait_until(lambda: cluster.client.get("/ready").status_code == 200, "readiness", 60)
            reference.assert_equal(asyncio.run(_answer(cluster, references)), references, f"after {worker} was killed")


def _actor_pids(cluster: Cluster, worker: str) -> list[int]:
    """The process ids that a worker has joined the router with and that still live, by the router's log."""
    import json

    pids = []
    for line in cluster.log.read_text().splitlines():
        if '"worker_joined"' in line and f'"{worker}"' in line:
            pids.append(int(json.loads(line)["pid"]))
    return [pid for pid in pids[-1:] if psutil.pid_exists(pid)]
