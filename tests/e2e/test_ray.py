"""The same workers as actors on a Ray cluster of three nodes on this machine."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import httpx
import psutil
import pytest

from kvferry.benchmarks.restart.load import Tally, asking, keep_asking, undisturbed

from ..checkpoints import write_checkpoint
from . import reference
from . import test_autoscale as autoscale
from .cluster import Cluster, serve, wait_until

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster as RayCluster

HEAD_AWAY_S = 10.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayCluster]:
    """Three of one core each; workers are spread over them. The last test loses their head."""
    from ray.cluster_utils import Cluster as RayCluster

    os.environ.setdefault("RAY_worker_niceness", "0")  # of its nodes, as docs/operators.md asks for
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


class Site(NamedTuple):
    cluster: Cluster
    model_dir: Path


@pytest.fixture(scope="module")
def site(nodes: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A deployment of a worker of each role."""
    folder = tmp_path_factory.mktemp("site")
    model_dir = write_checkpoint(folder / "tiny")
    flags = ["--served-model-name", "tiny", "--dtype", "float32", "--kv-cache-memory-bytes", "16MiB"]
    flags += ["--launcher", "ray", "--ray-address", str(nodes.address)]
    with serve(model_dir, folder / "log", *flags, is_fork=False) as cluster:
        yield Site(cluster, model_dir)


async def _answer(cluster: Cluster, references: list[reference.Reference]) -> list[list[int]]:
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=240.0) as client:

        async def one(wanted: reference.Reference) -> list[int]:
            body = {"model": "tiny", "prompt": wanted.prompt, "max_tokens": len(wanted.tokens), "temperature": 0}
            answer = await client.post("/v1/completions", json={**body, "ignore_eos": True, "return_token_ids": True})
            assert answer.status_code == 200, answer.text
            tokens: list[int] = answer.json()["choices"][0]["token_ids"]
            return tokens

        return list(await asyncio.gather(*map(one, references)))


@pytest.mark.slow
def test_ray_pools_grow_lend_and_shrink_without_a_failed_request(nodes: RayCluster, tmp_path: Path) -> None:
    flags = (*autoscale.FLAGS, "--launcher", "ray", "--ray-address", str(nodes.address))
    model_dir = write_checkpoint(tmp_path / autoscale.MODEL)
    with serve(model_dir, tmp_path / "log", *flags, is_fork=False) as cluster:
        operator = autoscale.Operator.of(cluster)
        work = partial(autoscale.grow_flip_and_shrink, operator)
        autoscale.check(cluster, asyncio.run(autoscale.under_load(cluster, work)))


@pytest.mark.slow
def test_nodes_answer_the_same_and_a_killed_actor_comes_back(site: Site) -> None:
    cluster, model_dir = site
    prompts = [[(7 * i * i + n) % 500 + 4 for i in range(50 * n)] for n in range(1, 5)]
    references = reference.greedy(model_dir, prompts, 12)
    reference.assert_equal(asyncio.run(_answer(cluster, references)), references, "ray")
    wait_until(lambda: cluster.metric("kvferry_kv_transfer_bytes_count") == len(references), "every report")
    assert cluster.metric("kvferry_fallback_total") == 0, cluster.log.read_text()
    for worker in ("p-0", "d-0"):
        [pid] = _actor_pids(cluster, worker)
        psutil.Process(pid).send_signal(signal.SIGKILL)
        known: tuple[list[int], ...] = ([], [pid])
        wait_until(lambda worker=worker, known=known: _actor_pids(cluster, worker) not in known, f"a new {worker}")
        wait_until(lambda: cluster.client.get("/ready").status_code == 200, "readiness")
        reference.assert_equal(asyncio.run(_answer(cluster, references)), references, f"after {worker} was killed")


def _actor_pids(cluster: Cluster, worker: str) -> list[int]:
    """The process ids that a worker has joined the router with and that still live, by the router's log."""
    import json

    pids = []
    for line in cluster.log.read_text().splitlines():
        if '"worker_joined"' in line and f'"{worker}"' in line:
            pids.append(int(json.loads(line)["pid"]))
    return [pid for pid in pids[-1:] if psutil.pid_exists(pid)]


@pytest.mark.slow
def test_ray_may_lose_its_head_while_tokens_flow(nodes: RayCluster, site: Site) -> None:
    cluster, _ = site
    before = cluster.metric("kvferry_fallback_total")
    [head] = nodes.head_node.all_processes["gcs_server"]
    tally = asyncio.run(_ask_without_head(cluster, head.process.pid))
    assert tally.failures == []
    assert tally.num_requests > 2 and tally.num_tokens > 20  # pieces: a busy machine sends many tokens in one
    assert cluster.metric("kvferry_fallback_total") == before, cluster.log.read_text()
    assert not psutil.pid_exists(head.process.pid) or head.process.poll() is not None


async def _ask_without_head(cluster: Cluster, head_pid: int) -> Tally:
    """Streams without a pause for a while after the cluster's head has died."""
    tally, stop = Tally(), asyncio.Event()
    ask = asking(cluster.base_url, "tiny", 64)
    wanted = await undisturbed(ask, ["Where do blocks cross?", "And when?"])
    asking_on = asyncio.create_task(keep_asking(ask, wanted, 0, stop, tally))
    psutil.Process(head_pid).send_signal(signal.SIGKILL)
    await asyncio.sleep(HEAD_AWAY_S)  # the promise is about this time
    # A busy machine streams slowly.
    await asyncio.to_thread(wait_until, lambda: tally.num_requests > 2 or tally.failures, "a third request")
    stop.set()
    await asking_on
    return tally
