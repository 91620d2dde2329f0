"""A worker of a Ray cluster: how soon is it run again, when is it ended? Its actor is a stub; no cluster is there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from kvferry.common.clock import SystemClock
from kvferry.launch import RayLauncher, ray_calls, ray_worker
from kvferry.launch.plan import plan
from kvferry.launch.process import ChildTimes
from kvferry.launch.progress import LogDisplay
from kvferry.launch.ray_worker import RaySite, RayWorker
from kvferry.settings.fields import ServeSettings

pytest.importorskip("ray")

TIMES = ChildTimes(first_backoff_s=0.01, max_backoff_s=0.05)


class Config:
    worker_id = "d-0"

    def model_copy(self, update: object) -> Config:
        return self

    def model_dump_json(self) -> str:
        return "{}"


class Plan:
    config = Config()


class Routers:
    controls = ()


class Actor:
    """Its `run` ends again and again, after so many seconds."""

    def __init__(self, lives_s: list[float], retired: asyncio.Event) -> None:
        self._lives_s = lives_s
        self._retired = retired

    @property
    def run(self) -> Actor:
        return self

    def remote(self, *arguments: object) -> Awaitable[int]:
        return self._end()

    async def _end(self) -> int:
        await asyncio.sleep(self._lives_s.pop(0))
        if not self._lives_s:
            self._retired.set()
        return 1


class Pinged:
    """Its `ping` is answered at once, but for the second one, which is left to `second`."""

    def __init__(self, second: Callable[[asyncio.Future[int]], None]) -> None:
        self._second = second
        self._num_pings = 0
        self.third = asyncio.Event()

    @property
    def ping(self) -> Pinged:
        return self

    def options(self, **_: object) -> Pinged:
        return self

    def remote(self) -> asyncio.Future[int]:
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._num_pings += 1
        if self._num_pings == 2:
            self._second(answer)
        else:
            answer.set_result(1)
        if self._num_pings == 3:
            self.third.set()
        return answer


def site(told: list[dict[str, object]]) -> RaySite:
    routers = cast(Any, Routers())
    return RaySite(routers, lambda: (), "m:f", True, 1.0, TIMES, on_event=lambda _, event: told.append(event))


def killed_by_watch(monkeypatch: pytest.MonkeyPatch, second: Callable[[asyncio.Future[int]], None]) -> list[object]:
    """Return why its actor was killed, after three pings."""
    monkeypatch.setattr(ray_worker, "_PING_EVERY_S", 0.01)
    monkeypatch.setattr(ray_worker, "_HANG_AFTER_S", 0.8)

    async def in_thread(function: Callable[[], None], limit_s: float) -> bool:
        return True

    monkeypatch.setattr(ray_calls, "in_thread", in_thread)

    async def run() -> list[object]:
        told: list[dict[str, object]] = []
        worker = RayWorker(cast(Any, Plan()), cast(Any, None), site(told))
        worker.actor = cast(Any, actor := Pinged(second))
        watching = asyncio.ensure_future(worker._watch())
        await asyncio.wait_for(actor.third.wait(), 60.0)
        watching.cancel()
        return [event["reason"] for event in told]

    return asyncio.run(run())


def delays_after(lives_s: list[float]) -> list[float]:
    async def run() -> list[float]:
        told: list[dict[str, object]] = []
        worker = RayWorker(cast(Any, Plan()), cast(Any, None), site(told))
        worker.actor = cast(Any, Actor([*lives_s, 0.0], worker.retired))
        await asyncio.wait_for(worker._keep_running(), 30.0)
        return [cast(float, event["delay_s"]) for event in told]

    return asyncio.run(run())


def test_who_ends_again_and_again_waits_longer() -> None:
    assert delays_after([0.0, 0.0, 0.0]) == [0.01, 0.02, 0.04]


def test_who_ran_longer_than_the_longest_pause_has_not_failed_before() -> None:
    assert delays_after([0.0, 0.0, 0.1, 0.0]) == [0.01, 0.02, 0.01, 0.02]


def test_an_actor_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert killed_by_watch(monkeypatch, lambda answer: None) == ["no sign of life for 0.8 s"]


def test_no_actor_is_ended_because_the_launcher_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer has come meanwhile, and nobody has looked."""

    def stand_still(answer: asyncio.Future[int]) -> None:
        loop = asyncio.get_running_loop()

        def stand() -> None:
            time.sleep(1.2)
            loop.call_soon_threadsafe(answer.set_result, 1)

        loop.call_later(0.05, stand)

    assert killed_by_watch(monkeypatch, stand_still) == []


def test_a_reload_that_fails_is_told_in_the_log_of_the_launcher(tmp_path: Path) -> None:
    """SIGHUP has no other answer."""
    notes: list[str] = []

    class Shown(LogDisplay):
        def note(self, text: str) -> None:
            notes.append(text)

    deployment = plan(ServeSettings(port=0), tmp_path, "m", (b"s" * 16,))
    launcher = RayLauncher(deployment, {}, SystemClock(), Shown(is_text=False))
    assert asyncio.run(launcher.reload()) == ["nothing serves yet"]
    assert notes == ["reload failed: nothing serves yet"]
