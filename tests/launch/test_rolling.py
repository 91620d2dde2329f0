"""A restart begins when nobody else is missing: what it waits for is told, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvferry.common.clock import SystemClock
from kvferry.common.errors import ConfigError
from kvferry.launch import local, on_ray, rolling, routers
from kvferry.launch.command_socket import command_socket
from kvferry.launch.local import LocalLauncher
from kvferry.launch.process import ChildState, ChildTimes
from kvferry.launch.running import ask

from .test_launch import WAIT_S, Recorder, deployment, lives, running
from .test_scaling_launch import StubRequests, fitted

PATIENT = ChildTimes(first_backoff_s=1000.0, max_backoff_s=1000.0, stable_after_s=3600.0)  # one that ends stays away


@pytest.fixture(autouse=True)
def many_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "_NOTE_EVERY_S", 0.1)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling, "MISSING_LIMIT_S", 0.3)


async def end(tmp_path: Path, recorder: Recorder, name: str) -> None:
    os.kill(lives(tmp_path, name)[-1]["pid"], signal.SIGKILL)
    await recorder.until_ended(name, 1)


@asynccontextmanager
async def without_a_prefill_worker(tmp_path: Path, recorder: Recorder) -> AsyncIterator[LocalLauncher]:
    async with running(deployment(tmp_path), recorder, PATIENT) as launcher:
        await recorder.until(lambda: launcher.status()["state"] == "serving")
        await end(tmp_path, recorder, "p-0")
        yield launcher


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("name", [None, "router", "d-0"])
async def test_nothing_is_restarted_while_another_is_missing(tmp_path: Path, name: str | None) -> None:
    recorder, told = Recorder(), list[str]()
    async with without_a_prefill_worker(tmp_path, recorder) as launcher:
        assert not await asyncio.wait_for(launcher.restart(told.append, name), WAIT_S)
        missing = "p-0 has ended, and starts after a pause"
        assert f"waits for others: {missing}" in told
        assert told[-1] == recorder.notes[-1] == f"no restart: others are missing after 0.3 s: {missing}"
        assert len(lives(tmp_path, "d-0")) == len(lives(tmp_path, "router")) == 1
        assert launcher.status()["state"] == "serving"


@pytest.mark.usefixtures("hasty")
async def test_a_worker_that_a_router_has_not_found_yet_is_waited_for(tmp_path: Path) -> None:
    recorder, told = Recorder(), list[str]()
    async with running(deployment(tmp_path), recorder) as launcher:
        wishes = StubRequests(tmp_path)
        await recorder.until(lambda: launcher.status()["state"] == "serving")
        assert not await launcher.routers.wait_until_whole(launcher.workers, WAIT_S, told.append)
        wishes.say(event="pools", reasons=[], workers={"d-0": lives(tmp_path, "d-0")[0]["pid"]})
        wishes.say(event="progress", fraction=1.0)
        await recorder.until(lambda: bool(recorder.of("router", "progress")))
        assert not await asyncio.wait_for(launcher.restart(told.append, "d-0"), WAIT_S)
        assert told[-1] == "no restart: others are missing after 0.3 s: router does not see p-0"


async def test_one_that_is_missing_itself_may_be_restarted(tmp_path: Path) -> None:
    recorder, told = Recorder(), list[str]()
    times = ChildTimes(first_backoff_s=0.2, stable_after_s=3600.0)
    async with running(deployment(tmp_path), recorder, times) as launcher:
        await recorder.until(lambda: launcher.status()["state"] == "serving")
        fault = tmp_path / "fault"
        fault.write_text("crash")
        await end(tmp_path, recorder, "p-0")
        assert not await asyncio.wait_for(launcher.restart(told.append, "p-0"), WAIT_S)
        assert told[-2:] == [
            "rolling restart 1/1: p-0 is down, and waited for",
            "rolling restart stopped: p-0 did not come back",
        ]
        fault.unlink()
        assert await asyncio.wait_for(launcher.restart(told.append, "p-0"), WAIT_S)


async def test_workers_come_and_go_while_a_restart_waits(tmp_path: Path) -> None:
    recorder, wishes = Recorder(), StubRequests(tmp_path)
    async with running(fitted(tmp_path), recorder, PATIENT) as launcher:
        await wishes.until(seq=-1)
        await end(tmp_path, recorder, "p-0")
        restart = asyncio.create_task(launcher.restart(lambda note: None, "router"))
        await recorder.until(lambda: any(note.startswith("waits for others: ") for note in recorder.notes))
        await wishes.until(seq=wishes.scale(remove=["d-0"]))
        assert not restart.done()
        restart.cancel()


async def test_one_that_is_down_holds_nothing_up_and_may_be_waited_for_no_longer(tmp_path: Path) -> None:
    """Nobody knows how long its start takes."""
    recorder, wishes = Recorder(), StubRequests(tmp_path)
    async with running(fitted(tmp_path), recorder, PATIENT) as launcher:
        await wishes.until(seq=-1)
        await end(tmp_path, recorder, "p-0")
        restart = asyncio.create_task(launcher.restart(lambda note: None, "p-0"))
        await recorder.until(lambda: "rolling restart 1/1: p-0 is down, and waited for" in recorder.notes)
        await wishes.until(seq=wishes.scale(decode=1))
        restart.cancel()
        await recorder.until(lambda: "no restart: who asked for it has left before it began" in recorder.notes)
        await asyncio.wait((restart,))
        assert launcher.status()["state"] == "serving"
        launcher.workers[0].excuse(lives(tmp_path, "p-0")[0]["pid"])  # it starts at once
        await recorder.until_ready("p-0", 2)
        assert await asyncio.wait_for(launcher.restart(lambda note: None, "p-0"), WAIT_S)


async def test_a_restart_that_waits_when_the_deployment_ends_is_not_said_to_be_given_up(tmp_path: Path) -> None:
    recorder = Recorder()
    async with without_a_prefill_worker(tmp_path, recorder) as launcher:
        restart = asyncio.create_task(launcher.restart(lambda note: None))
        await recorder.until(lambda: bool(recorder.notes))
        launcher.stop()
        restart.cancel()  # as all that goes on is
        await asyncio.wait((restart,))
    assert all(note.startswith("waits for others: ") for note in recorder.notes)


async def test_who_is_alone_in_its_pool_is_seen_when_its_turn_comes() -> None:
    """Routers change roles while a restart goes on, and one that was restarted has the role again that it began in."""
    roles, limits = {"p-0": "prefill", "p-1": "decode", "d-0": "decode"}, dict[str, float | None]()

    def worker(name: str) -> Any:
        async def restart(drain_s: float | None) -> bool:
            limits[name] = drain_s
            roles["p-1"] = "prefill" if name == "p-1" else roles["p-1"]
            return True

        return SimpleNamespace(name=name, state=ChildState.READY, is_retired=False, restart=restart)

    async def nobody_is_missing(*_: object, **__: object) -> str:
        return ""

    routers: Any = SimpleNamespace(children=[], wait_until_whole=nobody_is_missing)
    workers = [worker(name) for name in roles]
    assert await rolling.Roll(routers, workers, lambda: roles, SystemClock(), lambda note: None).run()
    assert limits == {"p-0": rolling.ALONE_DRAIN_S, "p-1": None, "d-0": rolling.ALONE_DRAIN_S}


async def test_nothing_begins_while_the_deployment_drains(tmp_path: Path) -> None:
    """Whatever routers still say."""
    recorder = Recorder()
    async with running(fitted(tmp_path), recorder) as launcher:
        await recorder.until(lambda: launcher.status()["state"] == "serving")
        launcher.drain()
        add = {"prefill": 1, "decode": 1}
        launcher.routers.on_event("router", {"event": "scale", "seq": 1, "add": add, "reason": "a test"})
        await asyncio.sleep(0.02)  # what has served is being ended by now
        launcher.routers.on_event("router", {"event": "restart_all"})
        assert not [note for note in recorder.notes if "restart" in note or note.startswith("workers ")]


async def test_a_restart_that_waits_is_given_up_when_its_asker_leaves(tmp_path: Path) -> None:
    recorder, path = Recorder(), tmp_path / "c.sock"
    async with without_a_prefill_worker(tmp_path, recorder) as launcher, command_socket(path, launcher):
        await leave_after(path, "waits for others: ", "router")
        await recorder.until(lambda: launcher.status()["state"] == "serving")
        assert recorder.notes[-1] == "no restart: who asked for it has left before it began"
        launcher.workers[0].excuse(lives(tmp_path, "p-0")[0]["pid"])  # it starts at once
        await recorder.until_ready("p-0", 2)
        assert await asyncio.wait_for(launcher.restart(lambda note: None, "d-0"), WAIT_S)
        assert len(lives(tmp_path, "router")) == 1


async def test_a_restart_that_has_begun_outlives_its_asker(tmp_path: Path) -> None:
    recorder, path = Recorder(), tmp_path / "c.sock"
    async with running(deployment(tmp_path), recorder) as launcher, command_socket(path, launcher):
        await recorder.until(lambda: launcher.status()["state"] == "serving")
        await leave_after(path, "rolling restart 1/3: p-0 drains")
        await recorder.until(lambda: recorder.notes[-1].startswith("rolling restart done"))
        assert [len(lives(tmp_path, name)) for name in ("p-0", "d-0", "router")] == [2, 2, 2]


async def leave_after(path: Path, note: str, name: str | None = None) -> None:
    """Ask for a restart, and leave once this is told."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(json.dumps({"command": "restart", "name": name}).encode() + b"\n")
    async with asyncio.timeout(WAIT_S):
        while not json.loads(await reader.readline())["note"].startswith(note):
            pass
    writer.close()
    await writer.wait_closed()


# --- other commands ---------------------------------------------------------------------------------------------------


async def test_whatever_goes_wrong_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> tuple[bytes, ...]:
        raise RecursionError("too deep")

    path = tmp_path / "c.sock"
    async with running(deployment(tmp_path), Recorder()) as launcher, command_socket(path, launcher):
        monkeypatch.setattr(local, "read_credentials", fail)
        [answer] = await asyncio.to_thread(lambda: list(ask(path, {"command": "reload"})))
        assert not answer["ok"] and str(answer["error"]).startswith("RecursionError: too deep; the deployment goes on")
        [status] = await asyncio.to_thread(lambda: list(ask(path, {"command": "status"})))
        assert status["ok"]


async def test_files_are_read_aside_so_that_the_launcher_watches_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def read(*_: object) -> tuple[bytes, ...]:
        threads.append(threading.get_ident())
        raise ConfigError("a mistake")

    for module in (local, on_ray):
        monkeypatch.setattr(module, "read_credentials", read)
    async with running(deployment(tmp_path), Recorder()) as launcher:
        assert await launcher.reload() == ["a mistake"]
    ray = on_ray.RayLauncher(deployment(tmp_path), {}, SystemClock(), Recorder())
    monkeypatch.setattr(ray, "_routers", SimpleNamespace(children=[]))
    assert await ray.reload() == ["a mistake"]
    assert len(threads) == 2 and threading.get_ident() not in threads
