"""Routers over one folder of answers, and calls for background responses."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from kvferry.router.kept.answers import KeptAnswers
from kvferry.router.responses.background import BackgroundResponses
from kvferry.router.responses.event_files import EventFolder
from kvferry.router.responses.store import FolderStore

from ..fakes import Script, Served, serve

PATH = "/v1/responses"
BODY = {"input": "hi", "background": True, "max_output_tokens": 40}


def router(folder: Path, text: str = "Hello, world", script: Script | None = None, **options: Any) -> Served:
    return serve(script or Script(text), kept_answers=KeptAnswers(folder), **options)


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def runs(served: Served) -> BackgroundResponses:
    found = served.app.background
    assert isinstance(found, BackgroundResponses)
    return found


async def call(served: Served, method: str, path: str = "", **options: Any) -> httpx.Response:
    async with served.client(**options.pop("headers", {})) as client:
        return await client.request(method, PATH + path, **options)


async def begin(served: Served, **body: Any) -> dict[str, Any]:
    response = await call(served, "POST", json=BODY | body)
    assert response.status_code == 200, response.text
    state: dict[str, Any] = response.json()
    assert (state["status"], state["background"], state["output"]) == ("in_progress", True, [])
    return state


async def shown(served: Served, state: dict[str, Any]) -> dict[str, Any]:
    response = await call(served, "GET", f"/{state['id']}")
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    assert found["id"] == state["id"]
    return found


def damage(path: Path) -> None:
    """Leave of a file what a machine's crash may: its length, and zeros where it was not written yet."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(2_000):
        if await check():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come")


async def ended(served: Served, state: dict[str, Any]) -> dict[str, Any]:
    async def is_over() -> bool:
        return bool((await shown(served, state))["status"] != "in_progress")

    await until(is_over)
    return await shown(served, state)


def text_of(response: dict[str, Any]) -> str:
    [item] = response["output"]
    [part] = item["content"]
    return str(part["text"])


async def sweep_below_what_follows(folder: Path) -> None:
    """Have more come than the folders of states and events may have, after all that is in them."""
    await asyncio.to_thread(_sweep, folder)


def _sweep(folder: Path) -> None:
    bound = 60_000
    sweepers = FolderStore(folder / "responses", bound).sweeper, EventFolder(folder / "events", bound).sweeper
    for path, sweeper in zip((folder / "responses", folder / "events"), sweepers, strict=True):
        for older in path.iterdir():
            os.utime(older, (time.time() - 100.0,) * 2)
        for number in range(4):
            (path / f"later{number}").write_bytes(b"x" * 15_000)
            os.utime(path / f"later{number}", (time.time() - 50.0 + number,) * 2)
        sweeper.sweep()
        assert sum(max(4096, left.stat().st_size) for left in path.iterdir()) <= bound
        assert (path / "later3").exists()
