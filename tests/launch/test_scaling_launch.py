"""Launchers grow and shrink a deployment as routers wish: stub programs that read their wishes from a file."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kvferry.common.clock import SystemClock
from kvferry.common.config import SECRET_VARIABLE, Device, environment
from kvferry.common.errors import ConfigError
from kvferry.common.machine import usable_cpus
from kvferry.launch import on_ray, ray_calls
from kvferry.launch.host import Gpu, Host
from kvferry.launch.local import LocalLauncher
from kvferry.launch.on_ray import RayLauncher
from kvferry.launch.plan import Deployment, WorkerPlan, fit_to_host, plan
from kvferry.launch.process import Child, ChildTimes
from kvferry.launch.ray_worker import RaySite
from kvferry.settings.fields import ServeSettings
from kvferry.settings.pools import PoolSettings

from .launch_stubs import whole_lines
from .test_launch import ROUTER, WAIT_S, Recorder, lives, running, until_gone, until_lives

T = TypeVar("T")


def deployment(tmp_path: Path, name: str = "fine", *, routers: int = 1, device: Device = "auto") -> Deployment:
    """One worker of each pool, up to two prefill and three decode workers."""
    settings = ServeSettings(
        port=0,
        prefill=PoolSettings(workers=1, max_workers=2),
        decode=PoolSettings(workers=1, max_workers=3),
        routers=routers,
        autoscale="on",
        device=device,
    )
    return plan(settings, tmp_path, name, (b"s" * 16,))


def fitted(tmp_path: Path, name: str = "fine", *, routers: int = 1) -> Deployment:
    return fit_to_host(deployment(tmp_path, name, routers=routers), Host(num_cpus=4, free_memory_bytes=1 << 30))


async def until(condition: Callable[[], T | None]) -> T:
    """Poll: what is waited for comes through files."""
    async with asyncio.timeout(WAIT_S):
        while not (found := condition()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return found


class StubRequests:
    """What the stub routers say, and what they were told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seq = 0

    def say(self, **event: object) -> None:
        with (self._folder / "wishes.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\n")

    def scale(self, *, prefill: int = 0, decode: int = 0, remove: list[str] | None = None, **more: object) -> int:
        self._seq += 1
        add = {"prefill": prefill, "decode": decode}
        self.say(event="scale", seq=self._seq, add=add, remove=remove or [], reason="a test", **more)
        return self._seq

    def heard(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in whole_lines(self._folder / "heard.jsonl")]

    def fleets(self) -> list[dict[str, Any]]:
        """Every word about the fleet that a router was told."""
        return [event for event in self.heard() if event["event"] == "fleet"]

    async def until(self, **wanted: object) -> dict[str, Any]:
        """The latest word about the fleet, once it has these values."""

        def latest() -> dict[str, Any] | None:
            told = self.fleets()
            return told[-1] if told and all(told[-1][key] == value for key, value in wanted.items()) else None

        return await until(latest)


def leaders(wishes: StubRequests) -> dict[int | None, bool]:
    """Which router processes were told last that they decide."""
    return {event["pid"]: event["leader"] for event in wishes.fleets()}


@asynccontextmanager
async def scaling(plan: Deployment, tmp_path: Path) -> AsyncIterator[tuple[LocalLauncher, StubRequests, Recorder]]:
    recorder, wishes = Recorder(), StubRequests(tmp_path)
    async with running(plan, recorder) as launcher:
        await wishes.until(seq=-1)
        yield launcher, wishes, recorder


async def test_wished_workers_start_under_fresh_names_and_are_drained_when_they_shall_go(tmp_path: Path) -> None:
    async with scaling(fitted(tmp_path), tmp_path) as (launcher, wishes, recorder):
        seq = wishes.scale(prefill=1, decode=1)
        told = await wishes.until(seq=seq)
        assert told["workers"] == {"p-0": "prefill", "d-0": "decode", "p-1": "prefill", "d-1": "decode"}
        await recorder.until_ready("d-1", 1)
        assert "workers +p-1 +d-1: a test" in recorder.notes
        pid = lives(tmp_path, "d-0")[0]["pid"]
        seq = wishes.scale(remove=["d-0"])
        await until_gone([pid])
        told = await wishes.until(seq=seq, leaving=[])
        assert "d-0" not in told["workers"]
        signals = [json.loads(line) for line in (tmp_path / "signals.jsonl").read_text().splitlines()]
        assert signals == [{"name": "d-0", "signal": 15}]
        assert not recorder.of("d-0", "restart")
        assert sorted(child.name for child in launcher.workers) == ["d-1", "p-0", "p-1"]
        wishes.scale(decode=1)
        await recorder.until_ready("d-2", 1)
    await until_gone([life["pid"] for life in lives(tmp_path)])


async def test_status_tells_what_routers_see_of_workers(tmp_path: Path) -> None:
    async with scaling(fitted(tmp_path), tmp_path) as (launcher, wishes, _):
        assert launcher.status()["experts"] is None
        uneven = {"imbalance": 1.8, "rank_imbalance": 1.2}
        roles = {"p-0": "decode", "d-0": "decode"}

        def say_and_ask() -> object:
            """Say it again and again: what the router says of workers that have just come takes its place."""
            workers = {child.name: child.pid for child in launcher.workers}
            wishes.say(event="pools", reasons=[], workers=workers, roles=roles, experts=uneven)
            return launcher.status()["experts"]

        await until(say_and_ask)
        rows: Any = launcher.status()["processes"]
        assert launcher.status()["experts"] == uneven
        assert {row["name"]: row["role"] for row in rows} == {"router": "router", "p-0": "decode", "d-0": "decode"}


async def test_a_new_worker_that_cannot_start_is_given_up_and_the_others_serve_on(tmp_path: Path) -> None:
    async with scaling(fitted(tmp_path), tmp_path) as (launcher, wishes, recorder):
        (tmp_path / "fault").write_text("unknown model")
        wishes.scale(decode=1)
        await recorder.until(lambda: any("d-1 could not start" in note for note in recorder.notes))
        assert len(launcher.workers) == 2
        await wishes.until(workers={"p-0": "prefill", "d-0": "decode"})
        told = await wishes.until(seq=wishes.scale(decode=1))  # not again at once
        assert set(told["workers"]) == {"p-0", "d-0"}


async def test_a_worker_that_drains_by_itself_does_not_come_back_and_gets_no_second_signal(tmp_path: Path) -> None:
    async with scaling(fitted(tmp_path), tmp_path) as (_, wishes, recorder):
        await wishes.until(seq=wishes.scale(lost=["d-0"], decode=1), leaving=["d-0"])
        assert not (tmp_path / "signals.jsonl").exists()
        pid = lives(tmp_path, "d-0")[0]["pid"]
        os.kill(pid, 9)
        await wishes.until(leaving=[])
        assert not recorder.of("d-0", "restart")
        await recorder.until_ready("d-1", 1)


async def test_one_router_decides_and_all_hear_of_it(tmp_path: Path) -> None:
    async with scaling(fitted(tmp_path, routers=2), tmp_path) as (launcher, wishes, _):
        first, second = (child.pid for child in launcher.routers.children)
        await until(lambda: leaders(wishes) == {first: True, second: False})
        wishes.say(event="hold", counts=[1, 2], for_s=None)
        await wishes.until(held=[1, 2, None])
        wishes.say(event="hold", counts=None)
        await wishes.until(held=None)
        # Both stubs say the same: of the wishes, the leader's alone counts.
        told = await wishes.until(seq=wishes.scale(decode=1, desired=[1, 2]))
        assert len(told["workers"]) == 3
        assert told["desired"] == [1, 2]
        wishes.say(event="load", num_prompts=5)
        loads = await until(lambda: [event for event in wishes.heard() if event["event"] == "load"])
        assert {event["pid"] for event in loads} == {first}


async def test_the_next_router_decides_when_the_first_has_gone(tmp_path: Path) -> None:
    async with scaling(fitted(tmp_path, routers=2), tmp_path) as (launcher, wishes, recorder):
        await recorder.until_ready("router-1", 1)  # else the first one's next life may be there before it
        first, second = (child.pid for child in launcher.routers.children)
        assert first is not None
        os.kill(first, 9)
        # Until the first one's next life is ready: that may be before anybody looks.
        await until(lambda: any(event["pid"] == second and event["leader"] for event in wishes.fleets()))
        await recorder.until_ready("router-0", 2)


@pytest.mark.slow
async def test_a_rolling_restart_passes_over_workers_that_leave(tmp_path: Path) -> None:
    recorder, wishes = Recorder(), StubRequests(tmp_path)
    async with running(fitted(tmp_path), recorder) as launcher:
        await wishes.until(seq=-1)
        wishes.scale(decode=1)
        await recorder.until_ready("d-1", 1)
        restart = asyncio.create_task(launcher.restart(lambda note: None))
        await recorder.until(lambda: any(note.startswith("rolling restart 1/") for note in recorder.notes))
        wishes.scale(remove=["d-1"])  # not now
        assert await restart
        assert len(lives(tmp_path, "d-1")) == 2


class Placed:
    """A worker of a cluster that has come up at once, unless its model is said to be none."""

    state = "up"

    def __init__(self, plan: WorkerPlan, place: object, site: RaySite) -> None:
        self.plan, self.worker_id, self.place, self.site = plan, plan.config.worker_id, place, site
        self.was_ready, self.retired = asyncio.Event(), asyncio.Event()
        self.was_ready.set()
        self.work, self.actor = f"work of {self.worker_id}", self
        self.secrets: tuple[bytes, ...] = ()

    async def keep(self) -> None:
        assert self.site.routers.controls == ("127.0.0.1:4242",)
        if (Path(self.plan.config.engine.model_dir) / "fault").exists():
            raise ConfigError(f"{self.worker_id}: no such model")
        await self.retired.wait()

    @property
    def take_secrets(self) -> Placed:
        return self

    async def remote(self, secrets: tuple[bytes, ...]) -> None:
        """As a call of an actor: one is between two lives, one hangs."""
        from ray.exceptions import ActorUnavailableError

        self.secrets = secrets
        if self.worker_id == "d-0":
            raise ActorUnavailableError("unavailable", None)
        if self.worker_id == "d-1":
            await asyncio.Event().wait()


class Ray:
    """Stands for a cluster, and notes what is asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, num_gpus: int = 0) -> None:
        pytest.importorskip("ray")
        gpus = tuple(Gpu(str(index), "", 0, 0) for index in range(num_gpus))
        host = Host(num_cpus=4, free_memory_bytes=1 << 30, gpus=gpus, is_cluster=True)
        self.asked: list[object] = []
        self.ended: list[object] = []
        monkeypatch.setattr(on_ray, "RayWorker", Placed)
        monkeypatch.setattr(ray_calls, "connect", lambda address, num_ranks: self.asked.append(num_ranks))
        monkeypatch.setattr(ray_calls, "cluster_as_host", lambda: host)
        monkeypatch.setattr(ray_calls, "ask_for_place", lambda plan: self.asked.append(plan.config.worker_id))
        monkeypatch.setattr(ray_calls, "wait_for_places", self._wait_for_places)
        monkeypatch.setattr("ray.cancel", lambda work: self.ended.append(f"cancel {work}"))
        monkeypatch.setattr("ray.wait", lambda works, *, num_returns, timeout: self.ended.append(num_returns))
        monkeypatch.setattr("ray.kill", lambda actor, *, no_restart: self.ended.append((actor.worker_id, no_restart)))
        monkeypatch.setattr("ray.shutdown", lambda: self.ended.append("shutdown"))

    async def _wait_for_places(self, plans: Sequence[WorkerPlan], places: Sequence[object]) -> None:
        self.asked.append(len(places))


@asynccontextmanager
async def on_stub_ray(
    tmp_path: Path, device: Device = "cpu"
) -> AsyncIterator[tuple[RayLauncher, StubRequests, Recorder]]:
    recorder, wishes = Recorder(), StubRequests(tmp_path)
    env = environment() | {SECRET_VARIABLE: "t" * 16}
    launcher = RayLauncher(
        deployment(tmp_path, device=device),
        env,
        SystemClock(),
        recorder,
        on_serving=recorder.on_serving,
        router_program=ROUTER,
    )
    assert launcher.status()["state"] == "starting"
    task = asyncio.create_task(launcher.run())
    task.add_done_callback(lambda _: recorder.wake())
    try:
        await recorder.until(lambda: bool(recorder.serving) or task.done())
        if not task.done():
            await wishes.until(seq=-1)
        yield launcher, wishes, recorder
    finally:
        launcher.stop()
        await asyncio.wait_for(task, WAIT_S)


def states_of(launcher: RayLauncher) -> dict[str, str]:
    rows: Any = launcher.status()["processes"]
    return {row["name"]: row["state"] for row in rows}


async def test_on_ray_too_no_worker_comes_while_the_deployment_drains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever routers still say."""
    ray = Ray(monkeypatch)
    async with on_stub_ray(tmp_path) as (launcher, _, _):
        routers = launcher._routers
        assert routers is not None
        for number in range(2):
            add = {"prefill": 0, "decode": 1}
            routers.on_event("router", {"event": "scale", "seq": number, "add": add, "reason": "a test"})
            launcher.drain()
            for _ in range(10):  # what has served is being ended by then, and the router has not ended yet
                await asyncio.sleep(0)
    assert ray.asked == [5, "p-0", "d-0", 2, "d-1"], "a cluster of its own has room for all that may come"


async def test_on_ray_too_a_new_worker_that_cannot_start_is_given_up_and_one_that_shall_go_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ray(monkeypatch)
    async with on_stub_ray(tmp_path) as (launcher, wishes, recorder):
        assert len(recorder.serving) == 1 and launcher.status()["state"] == "serving"
        await wishes.until(seq=wishes.scale(decode=1))
        assert states_of(launcher) == {"router": "ready", "p-0": "up", "d-0": "up", "d-1": "up"}
        await wishes.until(seq=wishes.scale(remove=["d-0", "d-1"]), leaving=[], workers={"p-0": "prefill"})
        (tmp_path / "fault").touch()
        wishes.scale(decode=1)
        await recorder.until(lambda: any("d-2 could not start" in note for note in recorder.notes))
        await wishes.until(leaving=[], workers={"p-0": "prefill"})
        assert states_of(launcher) == {"router": "ready", "p-0": "up"}
        killed: list[str] = []
        monkeypatch.setattr(Child, "kill", lambda child: killed.append(child.name))
        launcher.drain()
        assert launcher.status()["state"] == "ending" and not killed
        await until_gone([lives(tmp_path, "router")[0]["pid"]])
        launcher.stop()
        assert killed == ["router"], "who is asked twice waits no longer"
    assert [json.loads(line)["signal"] for line in whole_lines(tmp_path / "signals.jsonl")] == [signal.SIGTERM]


async def test_on_ray_a_worker_that_is_added_waits_in_the_cluster_for_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster may grow: whether there is one is not for the launcher to say."""
    ray = Ray(monkeypatch, num_gpus=2)
    async with on_stub_ray(tmp_path, "cuda") as (_, wishes, _):
        await wishes.until(seq=wishes.scale(decode=1))
    assert ray.asked[-1] == "d-1"


async def test_on_ray_one_of_the_first_workers_that_cannot_start_ends_the_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = Ray(monkeypatch)
    (tmp_path / "fault").touch()
    with pytest.raises(ConfigError, match=r"^[pd]-0: no such model$"):
        async with on_stub_ray(tmp_path):
            pass
    assert ray.ended[-1] == "shutdown"


async def test_on_ray_a_reload_brings_secrets_to_every_worker_and_names_those_that_do_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ray(monkeypatch)
    monkeypatch.setattr(on_ray, "_CALL_S", 0.01)
    async with on_stub_ray(tmp_path) as (launcher, wishes, recorder):
        await wishes.until(seq=wishes.scale(decode=1))
        assert lives(tmp_path, "router")[0]["env"][SECRET_VARIABLE] == "s" * 16
        failures = ["d-0: no answer", "d-1: no answer"]
        workers: Any = launcher._workers.values()
        assert await launcher.reload() == failures
        assert recorder.notes[-1] == f"reload failed: {'; '.join(failures)}"
        assert any(event["event"] == "reload" for event in wishes.heard())
        assert {worker.secrets for worker in workers} == {worker.site.secrets() for worker in workers} == {(b"t" * 16,)}
        launcher._env = {SECRET_VARIABLE: "short"}
        [failure] = await launcher.reload()
        assert "secret of 5 bytes" in failure and {worker.secrets for worker in workers} == {(b"t" * 16,)}
        launcher._secrets, launcher._env = (), {}
        assert await launcher.reload() == [], "there is nothing to bring"


async def test_on_ray_nothing_is_restarted_and_whoever_asks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ray(monkeypatch)
    async with on_stub_ray(tmp_path) as (launcher, wishes, recorder):
        told: list[str] = []
        assert not await launcher.restart(told.append)
        assert len(told) == 1 and told == recorder.notes and told[0].startswith("no restart: ")
        wishes.say(event="restart_all")
        await recorder.until(lambda: recorder.notes == 2 * told)


async def test_on_ray_workers_may_end_by_themselves_before_their_actors_are_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = Ray(monkeypatch)
    async with on_stub_ray(tmp_path):
        pass
    assert ray.ended == ["cancel work of p-0", "cancel work of d-0", 2, ("p-0", True), ("d-0", True), "shutdown"]


@pytest.mark.slow
async def test_ray_adds_workers_when_a_node_comes_and_gives_their_places_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))  # actors find the stubs
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        async with _on_ray(tmp_path, cluster.address) as (recorder, wishes):
            told = await wishes.until(seq=wishes.scale(decode=1))  # the only node is full: it waits
            assert told["workers"]["d-1"] == "decode"
            assert ray.available_resources().get("CPU", 0) == 0
            cluster.add_node(num_cpus=2)
            started = await until_lives(tmp_path, {"p-0", "d-0", "d-1"})
            threads = {name: life["config"]["num_threads"] for name, life in started.items()}
            assert threads == {"p-0": 1, "d-0": 1, "d-1": min(2, usable_cpus())}, "two share a node"
            wishes.scale(remove=["d-1"])
            await wishes.until(leaving=[], workers={"p-0": "prefill", "d-0": "decode"})
            assert any(event["event"] == "drain" and event["worker_id"] == "d-1" for event in wishes.heard())
            await until(lambda: ray.available_resources().get("CPU", 0) == 2)
            (tmp_path / "fault").write_text("unknown model")
            wishes.scale(decode=1)
            await recorder.until(lambda: any("d-2: no such model" in note for note in recorder.notes))
            await wishes.until(leaving=[], workers={"p-0": "prefill", "d-0": "decode"}, seq=3)
            await until(lambda: ray.available_resources().get("CPU", 0) == 2)
    finally:
        cluster.shutdown()


@asynccontextmanager
async def _on_ray(tmp_path: Path, address: str) -> AsyncIterator[tuple[Recorder, StubRequests]]:
    recorder, wishes = Recorder(), StubRequests(tmp_path)
    launcher = RayLauncher(
        deployment(tmp_path, device="cpu"),
        environment(),
        SystemClock(),
        recorder,
        address=address,
        on_serving=recorder.on_serving,
        router_program=ROUTER,
        worker_entry="launch_stubs:serve_worker",
        times=ChildTimes(hang_after_s=1.0, grace_s=2.0, drain_s=1.0),
    )
    task = asyncio.create_task(launcher.run())
    task.add_done_callback(lambda _: recorder.wake())
    try:
        await recorder.until(lambda: bool(recorder.serving) or task.done())
        await until_lives(tmp_path, {"p-0", "d-0"})
        yield recorder, wishes
    finally:
        launcher.stop()
        await asyncio.wait_for(task, WAIT_S)
