"""A worker of a Ray cluster whose `run` ends: how soon is it run again? The actor is a stub; no cluster is there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, cast

import pytest

from kvferry.launch.process import ChildTimes
from kvferry.launch.ray_worker import RaySite, RayWorker

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


def delays_after(lives_s: list[float]) -> list[float]:
    async def run() -> list[float]:
        told: list[dict[str, object]] = []
        site = RaySite(
            cast(Any, Routers()), lambda: (), "m:f", True, 1.0, TIMES, on_event=lambda _, event: told.append(event)
        )
        worker = RayWorker(cast(Any, Plan()), cast(Any, None), site)
        worker.actor = cast(Any, Actor([*lives_s, 0.0], worker.retired))
        await asyncio.wait_for(worker._keep_running(), 30.0)
        return [cast(float, event["delay_s"]) for event in told]

    return asyncio.run(run())


def test_who_ends_again_and_again_waits_longer() -> None:
    assert delays_after([0.0, 0.0, 0.0]) == [0.01, 0.02, 0.04]


def test_who_ran_longer_than_the_longest_pause_has_not_failed_before() -> None:
    assert delays_after([0.0, 0.0, 0.1, 0.0]) == [0.01, 0.02, 0.01, 0.02]
