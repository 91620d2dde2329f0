"""Routers over one folder of answers, and calls for background responses."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from kvferry.router.kept.answers import KeptAnswers
from kvferry.router.responses.background import BackgroundResponses

from ..fakes import Script, Served, serve

PATH = "/v1/responses"
BODY = {"input": "hi", "background": True, "max_output_tokens": 40}


def router(folder: Path, text: str = "Hello, world", script: Script | None = None, **options: Any) -> Served:
    return serve(script or Script(text), kept_answers=KeptAnswers(folder), **options)


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def runs(served: Served) -> BackgroundResponses:
    found = served.app.state.background
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
