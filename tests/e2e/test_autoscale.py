"""Pools grow, shrink and lend each other workers under load, and no client notices; test_ray does it with Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvferry.benchmarks.restart.load import Tally, asking, keep_asking, undisturbed

from ..checkpoints import write_checkpoint
from .cluster import Cluster, serve, wait_until

MODEL = "tiny"
NUM_TOKENS = 48
LIMIT_S = 240.0
FLAGS = (
    *("--served-model-name", MODEL, "--dtype", "float32", "--kv-cache-memory-bytes", "16MiB", "--device", "cpu"),
    *("--autoscale", "on", "--admin-port", "0", "--prefill-max", "2", "--decode-max", "2"),
    *("--scale-interval", "0.5", "--scale-down-after", "3", "--role-change-after", "1", "--drain-timeout", "10"),
)
Pools = list[tuple[str, str]]  # (worker id, role), those that are ready


@dataclass
class Operator:
    """Orders counts over the admin listener, and looks at what becomes of them."""

    cluster: Cluster
    admin_url: str

    @classmethod
    def of(cls, cluster: Cluster) -> Operator:
        [url] = cluster.admin_urls
        return cls(cluster, url)

    def hold(self, prefill: int, decode: int) -> None:
        answer = httpx.post(f"{self.admin_url}/admin/scaling", json={"prefill": prefill, "decode": decode})
        assert answer.status_code == 202, answer.text

    def release(self) -> None:
        assert httpx.delete(f"{self.admin_url}/admin/scaling").status_code == 202

    def scaling(self) -> dict[str, Any]:
        told: dict[str, Any] = httpx.get(f"{self.admin_url}/admin/scaling").json()
        return told

    def ready(self) -> Pools:
        workers = httpx.get(f"{self.admin_url}/admin/workers").json()["workers"]
        return sorted((w["worker_id"], w["role"]) for w in workers if w["state"] == "ready")

    def wait_for(self, prefill: int, decode: int) -> Pools:
        """Exactly these are connected and ready."""

        def is_so() -> bool:
            workers = httpx.get(f"{self.admin_url}/admin/workers").json()["workers"]
            roles = [worker["role"] for worker in workers]
            is_ready = all(worker["state"] == "ready" for worker in workers)
            return is_ready and (roles.count("prefill"), roles.count("decode")) == (prefill, decode)

        wait_until(is_so, f"{prefill} prefill and {decode} decode workers", LIMIT_S)
        return self.ready()


async def under_load(cluster: Cluster, work: Callable[[], None]) -> Tally:
    """What clients see while `work` runs: every answer must be what it is when nothing else happens."""
    tally, done = Tally(), asyncio.Event()
    ask = asking(cluster.base_url, MODEL, NUM_TOKENS)
    wanted = await undisturbed(ask, [f"{'Where do blocks cross? ' * (1 + n % 3)}{n}" for n in range(5)])
    async with asyncio.TaskGroup() as clients:
        for number in range(3):
            clients.create_task(keep_asking(ask, wanted, number, done, tally))
        try:
            await asyncio.to_thread(work)
        finally:
            done.set()
    return tally


def grow_flip_and_shrink(operator: Operator) -> None:
    begin = operator.wait_for(1, 1)
    operator.hold(1, 2)
    grown = operator.wait_for(1, 2)
    assert set(begin) < set(grown)
    operator.hold(2, 1)  # nobody starts or ends: one changes its role
    flipped = operator.wait_for(2, 1)
    assert {name for name, _ in flipped} == {name for name, _ in grown}
    operator.release()  # such a load needs one of each
    shrunk = operator.wait_for(1, 1)
    assert set(shrunk) < set(flipped)
    told = operator.scaling()
    assert told["held"] is None
    assert told["desired"] == told["current"] == {"prefill": 1, "decode": 1}
    assert "requests/s" in told["reason"]


def check(cluster: Cluster, tally: Tally) -> None:
    assert tally.failures == []
    assert tally.num_requests > 10
    for pool in ("prefill", "decode"):
        assert cluster.metric("kvferry_desired_replicas", f'pool="{pool}"') == 1


@pytest.mark.slow
def test_local_pools_grow_lend_and_shrink_without_a_failed_request(tmp_path: Path) -> None:
    with serve(write_checkpoint(tmp_path / MODEL), tmp_path / "log", *FLAGS, "--routers", "1") as cluster:
        operator = Operator.of(cluster)
        check(cluster, asyncio.run(under_load(cluster, lambda: grow_flip_and_shrink(operator))))
