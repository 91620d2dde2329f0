"""The launchers against stub programs: order of starts, restarts, hangs, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvferry.common.clock import SystemClock
from kvferry.common.config import environment
from kvferry.common.errors import ConfigError, WorkerLost
from kvferry.launch.command_socket import command_socket
from kvferry.launch.host import Host
from kvferry.launch.local import LocalLauncher
from kvferry.launch.on_ray import RayLauncher
from kvferry.launch.plan import Deployment, fit_to_host, plan
from kvferry.launch.process import ChildState, ChildTimes
from kvferry.launch.running import ask
from kvferry.settings.fields import ServeSettings
from kvferry.settings.pools import PoolSettings
from kvferry.wire.address import Address

from .launch_stubs import whole_lines

STUBS = str(Path(__file__).parent / "launch_stubs.py")
ROUTER = (sys.executable, STUBS, "router")
WORKER = (sys.executable, STUBS, "worker")
TIMES = ChildTimes(hang_after_s=1.0, grace_s=2.0, first_backoff_s=0.05)
WAIT_S = 120.0


class Recorder:
    """A display that remembers, and wakes whoever waits for an event."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []
        self.serving: list[Address] = []
        self.notes: list[str] = []
        self._changed = asyncio.Event()

    def on_event(self, name: str, event: dict[str, object]) -> None:
        self.events.append((name, event))
        self._changed.set()

    def on_serving(self, http: Address) -> None:
        self.serving.append(http)
        self._changed.set()

    def wake(self) -> None:
        self._changed.set()

    @property
    def children_stderr(self) -> int | None:
        return None

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._changed.set()

    def greet(self, greeting: str, facts: Mapping[str, object]) -> None:
        pass

    def done(self) -> None:
        pass

    def of(self, name: str, kind: str) -> list[dict[str, object]]:
        return [event for who, event in self.events if who == name and event["event"] == kind]

    async def until_ready(self, name: str, num_times: int) -> None:
        await self.until(lambda: len(self.of(name, "ready")) == num_times)

    async def until_ended(self, name: str, num_times: int) -> None:
        await self.until(lambda: len(self.of(name, "restart")) == num_times)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


def deployment(
    tmp_path: Path, name: str = "fine", *, prefill: int = 1, decode: int = 1, routers: int = 1
) -> Deployment:
    settings = ServeSettings(
        port=0,
        prefill=PoolSettings(workers=prefill),
        decode=PoolSettings(workers=decode),
        routers=routers,
        api_key=("k" * 8,),
    )
    return fit_to_host(plan(settings, tmp_path, name, (b"s" * 16,)), Host(num_cpus=4, free_memory_bytes=1 << 30))


def lives(tmp_path: Path, name: str | None = None) -> list[dict[str, Any]]:
    lines = whole_lines(tmp_path / "lives.jsonl")
    return [life for line in lines if (life := json.loads(line))["name"] == (name or life["name"])]


def processes(tmp_path: Path) -> list[int]:
    """Of all lives so far, with what they started themselves."""
    return [life[key] for life in lives(tmp_path) for key in ("pid", "follower") if key in life]


def socket_of(pid: int, fd: int) -> str:
    """The kernel's name of a process's open socket."""
    return os.readlink(f"/proc/{pid}/fd/{fd}")


async def until_gone(pids: list[int]) -> None:
    """Whoever's children they are."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(WAIT_S):
        for pid in pids:
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            ended = asyncio.Event()
            loop.add_reader(fd, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(fd)
                os.close(fd)


@asynccontextmanager
async def running(plan: Deployment, recorder: Recorder, times: ChildTimes = TIMES) -> AsyncIterator[LocalLauncher]:
    launcher = LocalLauncher(
        plan,
        environment(),
        SystemClock(),
        recorder,
        on_serving=recorder.on_serving,
        router_program=ROUTER,
        worker_program=WORKER,
        times=times,
    )
    task = asyncio.create_task(launcher.run())
    task.add_done_callback(lambda _: recorder.wake())
    try:
        await recorder.until(lambda: bool(recorder.serving) or task.done())
        yield launcher
    finally:
        launcher.stop()
        await asyncio.wait_for(task, WAIT_S)


@pytest.mark.slow
async def test_workers_start_with_the_routers_address_and_all_end_together(tmp_path: Path) -> None:
    recorder = Recorder()
    async with running(deployment(tmp_path, prefill=1, decode=2), recorder):
        started = lives(tmp_path)
        assert next(life["name"] for life in started) == "router"
        assert sorted(life["name"] for life in started) == ["d-0", "d-1", "p-0", "router"]
        assert all(life["routers"] == ["127.0.0.1:4242"] for life in started if life["name"] != "router")
        assert recorder.of("p-0", "progress")
    await until_gone(processes(tmp_path))


async def test_children_get_secret_and_threads_and_none_of_our_settings(tmp_path: Path) -> None:
    os.environ["KVFERRY_PORT"] = "9"
    try:
        async with running(deployment(tmp_path), Recorder()):
            life = lives(tmp_path, "d-0")[0]
    finally:
        del os.environ["KVFERRY_PORT"]
    env = life["env"]
    assert env["KVFERRY_SECRET"] == "s" * 16
    assert "KVFERRY_PORT" not in env
    assert env["OMP_NUM_THREADS"] == "2"  # 4 cores, 2 workers
    assert env["UCX_NET_DEVICES"] == "lo"
    assert life["config"]["kv_cache_memory_bytes"] == (1 << 30) // 10


async def test_killed_worker_comes_back_under_its_name(tmp_path: Path) -> None:
    recorder = Recorder()
    async with running(deployment(tmp_path), recorder) as launcher:
        child = launcher.workers[0]
        first = lives(tmp_path, "p-0")[0]
        os.kill(first["pid"], signal.SIGKILL)
        await recorder.until(lambda: len(recorder.of("p-0", "ready")) == 2)
        assert child.state is ChildState.READY
        assert child.num_restarts == 1
        assert "SIGKILL" in str(recorder.of("p-0", "restart")[0]["reason"])
        assert len(lives(tmp_path, "d-0")) == 1
        await until_gone([first["follower"]])
        calibrations_s = [life["calibration_s"] for life in lives(tmp_path, "p-0")]
        assert calibrations_s == [1.2, 0.3], "somebody may wait for the second"


async def test_restarted_router_keeps_its_ports(tmp_path: Path) -> None:
    recorder = Recorder()
    async with running(deployment(tmp_path), recorder) as launcher:
        before = launcher.routers.http, launcher.routers.controls
        os.kill(lives(tmp_path, "router")[0]["pid"], signal.SIGKILL)
        await recorder.until(lambda: len(recorder.of("router", "ready")) == 2)
        assert (launcher.routers.http, launcher.routers.controls) == before


async def test_routers_share_one_socket_and_every_worker_knows_them_all(tmp_path: Path) -> None:
    async with running(deployment(tmp_path, routers=3), Recorder()) as launcher:
        assert [child.name for child in launcher.routers.children] == ["router-0", "router-1", "router-2"]
        assert len({socket_of(life["pid"], life["http_fd"]) for life in lives(tmp_path, "router")}) == 1
        assert all(len(life["routers"]) == 3 for life in lives(tmp_path, "p-0"))
        assert launcher.routers.http.port > 0


@pytest.mark.slow
async def test_rolling_restart_takes_one_after_the_other_and_waits_for_it(tmp_path: Path) -> None:
    recorder = Recorder()
    async with running(deployment(tmp_path, prefill=2, decode=1, routers=2), recorder) as launcher:
        num_before = len(recorder.events)
        told: list[str] = []
        first = asyncio.create_task(launcher.restart(told.append))
        await asyncio.sleep(0)
        assert not await launcher.restart(lambda note: None)  # one is enough
        assert await first
        assert told == [note for note in recorder.notes if note.startswith("rolling")]
        steps = [(who, event["event"]) for who, event in recorder.events[num_before:] if event["event"] != "progress"]
        names = ["p-0", "p-1", "d-0", "router-0", "router-1"]
        assert steps == [(name, step) for name in names for step in ("restart", "started", "ready")]
        assert all(event["delay_s"] == 0 for _, event in recorder.events[num_before:] if event["event"] == "restart")
        assert sum("one is under way" in note for note in recorder.notes) == 1
        assert [note for note in recorder.notes if " 3/5: " in note] == ["rolling restart 3/5: d-0 drains"]
        assert lives(tmp_path, "d-0")[-1]["calibration_s"] == 1.2, "others serve meanwhile"


async def test_rolling_restart_stops_at_what_does_not_come_back(tmp_path: Path) -> None:
    recorder = Recorder()
    async with running(deployment(tmp_path, prefill=1, decode=1), recorder) as launcher:
        (tmp_path / "fault").write_text("crash")
        assert not await launcher.restart(lambda note: None)
        assert "p-0 did not come back" in recorder.notes[-1]
        assert len(lives(tmp_path, "d-0")) == 1
        (tmp_path / "fault").unlink()
        await recorder.until(lambda: len(recorder.of("p-0", "ready")) == 2)  # it is still being started


@pytest.mark.parametrize(("end", "number"), [("stop", signal.SIGINT), ("drain", signal.SIGTERM)])
async def test_children_are_told_whether_to_drain(tmp_path: Path, end: str, number: signal.Signals) -> None:
    async with running(deployment(tmp_path), Recorder()) as launcher:
        getattr(launcher, end)()
        await until_gone([life["pid"] for life in lives(tmp_path)])
    told = [json.loads(line) for line in (tmp_path / "signals.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in told) == ["d-0", "p-0", "router"]
    assert {line["signal"] for line in told} == {number}


async def test_a_drain_that_lasts_is_cut_short_by_a_second_signal(tmp_path: Path) -> None:
    recorder = Recorder()
    async with running(deployment(tmp_path, "stubborn"), recorder, ChildTimes(drain_s=1000.0)) as launcher:
        launcher.drain()
        launcher.stop()
    await until_gone(processes(tmp_path))


@pytest.mark.slow
async def test_who_comes_while_workers_drain_is_refused_and_waits_for_nobody(tmp_path: Path) -> None:
    recorder = Recorder()
    async with running(deployment(tmp_path, "stubborn"), recorder) as launcher:
        await recorder.until(lambda: bool(recorder.serving))
        (http,), (router,) = recorder.serving, lives(tmp_path, "router")
        launcher.drain()
        await until_gone([router["pid"]])
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(http.host, http.port)
        assert launcher.status()["http"] == f"http://{http}" and launcher.status()["state"] == "ending"
        launcher.drain()


async def test_what_served_for_a_while_comes_back_at_once_and_a_crash_loop_waits_longer_each_time(
    tmp_path: Path,
) -> None:
    recorder = Recorder()
    times = ChildTimes(first_backoff_s=0.01, stable_after_s=3600.0)
    async with running(deployment(tmp_path), recorder, times) as launcher:
        for number in range(2, 5):
            os.kill(lives(tmp_path, "p-0")[-1]["pid"], signal.SIGKILL)
            await recorder.until_ready("p-0", number)
        assert [event["delay_s"] for event in recorder.of("p-0", "restart")] == [0.01, 0.02, 0.04]
        assert launcher.workers[0].num_restarts == 3
    recorder, patient = Recorder(), ChildTimes(first_backoff_s=1000.0, stable_after_s=0.0)
    async with running(deployment(tmp_path), recorder, patient):
        os.kill(lives(tmp_path, "p-0")[-1]["pid"], signal.SIGKILL)
        await recorder.until(lambda: len(recorder.of("p-0", "ready")) == 2)
        assert recorder.of("p-0", "restart")[0]["delay_s"] == 0


@pytest.mark.slow
async def test_what_dies_of_a_request_is_not_waited_for(tmp_path: Path) -> None:
    """A router says so while the launcher waits, or before it has noticed the end; of other lives it says nothing."""
    recorder, patient = Recorder(), ChildTimes(first_backoff_s=1000.0, max_backoff_s=1e6, stable_after_s=3600.0)
    async with running(deployment(tmp_path), recorder, patient) as launcher:
        worker = launcher.workers[0]
        for number in range(2, 5):
            pid = lives(tmp_path, "p-0")[-1]["pid"]
            os.kill(pid, signal.SIGKILL)
            await recorder.until_ended("p-0", number - 1)
            assert worker.state is ChildState.WAITING
            excuse(tmp_path, "d-0", pid)
            excuse(tmp_path, "p-0", pid + 1)
            excuse(tmp_path, "p-0", pid)
            await recorder.until_ready("p-0", number)
        assert [event["delay_s"] for event in recorder.of("p-0", "restart")] == [1000.0] * 3, "none of them counts"
        pid = lives(tmp_path, "p-0")[-1]["pid"]
        worker.excuse(pid)
        os.kill(pid, signal.SIGKILL)
        await recorder.until_ready("p-0", 5)
        assert recorder.of("p-0", "restart")[-1]["delay_s"] == 0
        os.kill(lives(tmp_path, "p-0")[-1]["pid"], signal.SIGKILL)
        await recorder.until_ended("p-0", 5)
        worker.excuse(pid)  # too late: it was another life
        worker.excuse(None)
        assert recorder.of("p-0", "restart")[-1]["delay_s"] == 1000.0
        assert worker.state is ChildState.WAITING
        assert not recorder.of("d-0", "restart")


def excuse(tmp_path: Path, worker_id: str, incarnation: int) -> None:
    """What a router says."""
    event = {"event": "blameless", "worker_id": worker_id, "incarnation": incarnation}
    with (tmp_path / "wishes.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")


@pytest.mark.slow
async def test_worker_that_stops_beating_is_killed_and_started_again(tmp_path: Path) -> None:
    recorder = Recorder()
    async with running(deployment(tmp_path, "hang"), recorder):
        await recorder.until(lambda: bool(recorder.of("d-0", "restart")))
        assert "no sign of life" in str(recorder.of("d-0", "restart")[0]["reason"])
        await until_gone([lives(tmp_path, "d-0")[0]["pid"]])


@pytest.mark.slow
async def test_worker_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    async with running(deployment(tmp_path, "stubborn"), Recorder()):
        assert lives(tmp_path, "d-0")
    await until_gone(processes(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("unknown model", ConfigError, "no such model"),
        ("crash", WorkerLost, "did not start, 3 times: exit code 3"),
        ("broke", WorkerLost, "did not start, 3 times: rank 1 ended"),
    ],
)
async def test_what_cannot_start_ends_the_launch(
    tmp_path: Path, fault: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        async with running(deployment(tmp_path, fault), Recorder()):
            pass
    await until_gone(processes(tmp_path))


def test_back_off_doubles_up_to_its_bound() -> None:
    times = ChildTimes()
    assert [times.backoff_s(n) for n in (1, 2, 3, 4, 7, 8, 10_000)] == [0.5, 1.0, 2.0, 4.0, 30.0, 30.0, 30.0]


LAUNCH = """
import asyncio, sys
from pathlib import Path
from kvferry.tests.launch import test_launch as t

async def main():
    recorder = t.Recorder()
    async with t.running(t.deployment(Path(sys.argv[1])), recorder):
        print("serving", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.slow
async def test_children_die_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launcher = await asyncio.create_subprocess_exec(sys.executable, "-c", LAUNCH, str(tmp_path), stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    assert await asyncio.wait_for(launcher.stdout.readline(), WAIT_S) == b"serving\n"
    pids = processes(tmp_path)
    assert len(pids) == 5
    launcher.kill()
    await launcher.wait()
    await until_gone(pids)


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Two nodes on this machine; the address of their cluster."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))  # actors find the stubs
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


def on_ray(tmp_path: Path, name: str, address: str, recorder: Recorder) -> RayLauncher:
    settings = ServeSettings(port=0, launcher="ray", ray_address=address, device="cpu")
    return RayLauncher(
        plan(settings, tmp_path, name, (b"s" * 16,)),
        environment(),
        SystemClock(),
        recorder,
        address=address,
        on_serving=recorder.on_serving,
        router_program=ROUTER,
        worker_entry="launch_stubs:serve_worker",
        times=TIMES,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "error", "reason"),
    [
        ("unknown model", ConfigError, r"^[pd]-0: no such model$"),
        # Its `run` does not end: Ray repeats it.
        ("killed", WorkerLost, r"^[pd]-0 did not start, 3 times: its process or its node was lost"),
    ],
)
async def test_a_worker_of_ray_that_cannot_start_ends_the_launch(
    tmp_path: Path, ray_cluster: str, mode: str, error: type[Exception], reason: str
) -> None:
    launcher = on_ray(tmp_path, mode, ray_cluster, Recorder())
    with pytest.raises(error, match=reason):
        await asyncio.wait_for(launcher.run(), WAIT_S)
    await until_gone(processes(tmp_path))


@pytest.mark.slow
async def test_ray_spreads_workers_over_nodes_and_brings_a_killed_one_back(tmp_path: Path, ray_cluster: str) -> None:
    import ray

    recorder = Recorder()
    launcher = on_ray(tmp_path, "fine", ray_cluster, recorder)
    task = asyncio.create_task(launcher.run())
    task.add_done_callback(lambda _: recorder.wake())
    try:
        await recorder.until(lambda: bool(recorder.serving) or task.done())
        started = await until_lives(tmp_path, {"p-0", "d-0"})
        assert {life["role"] for life in started.values()} == {"prefill", "decode"}
        assert all(life["routers"] == ["127.0.0.1:4242"] and life["secret"] == "s" * 16 for life in started.values())
        assert started["p-0"]["host"] == ray.util.get_node_ip_address()
        assert started["p-0"]["node"] != started["d-0"]["node"]
        if os.geteuid() == 0:  # nobody else may take back the niceness that Ray gives
            assert [life["niceness"] for life in started.values()] == [0, 0]
        os.kill(started["d-0"]["pid"], signal.SIGKILL)
        await until_lives(tmp_path, {"d-0"}, num_lives=2)
    finally:
        launcher.stop()
        await asyncio.wait_for(task, WAIT_S)
    await until_gone([life["pid"] for life in lives(tmp_path)])


async def until_lives(tmp_path: Path, names: set[str], *, num_lives: int = 1) -> dict[str, dict[str, Any]]:
    """The latest life of each, once there are so many."""
    async with asyncio.timeout(WAIT_S):
        while any(len(lives(tmp_path, name)) < num_lives for name in names):  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # an actor tells nothing but through its file
    return {name: lives(tmp_path, name)[-1] for name in names}


# --- commands -------------------------------------------------------------------------------------------------------


async def test_a_reload_reaches_every_process_and_restarts_none(tmp_path: Path) -> None:
    recorder = Recorder()
    async with running(deployment(tmp_path, routers=2), recorder) as launcher:
        before = processes(tmp_path)
        assert await launcher.reload() == []
        heard = [json.loads(line) for line in whole_lines(tmp_path / "heard.jsonl")]
        assert len({event["pid"] for event in heard if event["event"] == "reload"}) == 2
        assert recorder.notes[-1] == "keys, secrets and certificates are read again"
        assert processes(tmp_path) == before


async def test_a_reload_that_one_process_cannot_do_is_told_with_its_name(tmp_path: Path) -> None:
    recorder = Recorder()
    async with running(deployment(tmp_path, "no reload", prefill=0), recorder) as launcher:
        assert await launcher.reload() == ["d-0: the file is gone"]
        assert recorder.notes[-1] == "reload failed: d-0: the file is gone"


async def test_a_file_that_is_wrong_is_told_before_any_process_hears_of_it(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    plan = deployment(tmp_path)
    plan = replace(plan, router=plan.router.model_copy(update={"api_key_file": keys}))
    async with running(plan, Recorder()) as launcher:
        keys.write_text("- broken")
        [failure] = await launcher.reload()
        assert failure.startswith(f"api_key_file: {keys}:1: ")
        heard = tmp_path / "heard.jsonl"
        assert not heard.exists() or "reload" not in heard.read_text()


async def test_status_names_every_process_with_its_state(tmp_path: Path) -> None:
    recorder = Recorder()
    async with running(deployment(tmp_path), recorder) as launcher:
        await recorder.until(lambda: launcher.status()["state"] == "serving")
        status = launcher.status()
        rows: Any = status["processes"]
        assert [(row["name"], row["role"], row["state"], row["restarts"]) for row in rows] == [
            ("router", "router", "ready", 0),
            ("p-0", "prefill", "ready", 0),
            ("d-0", "decode", "ready", 0),
        ]
        assert sorted(row["pid"] for row in rows) == sorted(life["pid"] for life in lives(tmp_path))
        assert status["http"] == f"http://{launcher.routers.http}"
        launcher.drain()
        assert launcher.status()["state"] == "ending"


async def test_one_process_is_restarted_by_its_name(tmp_path: Path) -> None:
    async with running(deployment(tmp_path, prefill=2), Recorder()) as launcher:
        told: list[str] = []
        assert await launcher.restart(told.append, "p-1")
        assert {name: len(lives(tmp_path, name)) for name in ("router", "p-0", "p-1", "d-0")} == {
            "router": 1,
            "p-0": 1,
            "p-1": 2,
            "d-0": 1,
        }
        assert not await launcher.restart(told.append, "p-9")
        assert told[-1] == "no restart: there is no process p-9"


async def test_a_runtime_folder_that_is_gone_spoils_no_end(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    async with running(deployment(tmp_path), Recorder()) as launcher, command_socket(folder / "1.sock", launcher):
        shutil.rmtree(folder)  # as $XDG_RUNTIME_DIR at the logout of its user


async def test_who_asks_for_a_drain_again_cuts_nothing_short(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    times = ChildTimes(drain_s=1000.0)
    async with running(deployment(tmp_path, "stubborn"), Recorder(), times) as launcher, command_socket(path, launcher):
        for _ in range(2):
            [drained] = await asyncio.to_thread(lambda: list(ask(path, {"command": "drain"})))
            assert drained["ok"] and launcher.is_ending
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await until_gone([life["pid"] for life in lives(tmp_path) if life["name"] != "router"])
    await until_gone(processes(tmp_path))


async def test_commands_reach_a_deployment_through_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"

    def say(**command: object) -> list[dict[str, object]]:
        return list(ask(path, dict(command)))

    async with running(deployment(tmp_path), Recorder()) as launcher, command_socket(path, launcher):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        [status] = await asyncio.to_thread(say, command="status")
        assert (status["ok"], status["pid"], status["state"]) == (True, os.getpid(), "serving")
        [reloaded] = await asyncio.to_thread(say, command="reload")
        assert reloaded["ok"]
        *notes, restarted = await asyncio.to_thread(say, command="restart", name="d-0")
        assert restarted["ok"] and notes[0] == {"note": "restart of d-0"}
        [unknown] = await asyncio.to_thread(say, command="fly")
        assert not unknown["ok"] and "unknown command 'fly'" in str(unknown["error"])
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(str(path))
            rude.sendall(b"[1]\n")
            answer = await asyncio.to_thread(rude.recv, 4096)
        assert json.loads(answer) == {"ok": False, "error": "no command came"}
        assert not launcher.is_ending
        [drained] = await asyncio.to_thread(say, command="drain")
        assert drained["ok"]
    assert not path.exists()
    with pytest.raises(ConfigError, match="nobody listens"):
        say(command="status")
