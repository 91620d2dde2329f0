"""A served application with a data folder, whose batches run; and lines for them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI
from openai.types import Batch

from kvferry.router.batches.folder import DataFolder
from kvferry.router.batches.keeper import Keeper

from ..fakes import Script, Served, listening, serve

ENDED = {"completed", "failed", "expired", "cancelled"}


def line(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    if not body:
        body = {"model": "toy", "prompt": custom_id, "max_tokens": 40}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def jsonl(*lines: object) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def data_folder(path: Path, max_bytes: int = 1 << 30) -> DataFolder:
    return DataFolder(path, max_bytes=max_bytes, retention_s=86400.0)


@asynccontextmanager
async def batch_server(
    path: Path, script: Script | None = None, *, max_bytes: int = 1 << 30, **options: Any
) -> AsyncIterator[tuple[Served, str]]:
    """Yield the application and its address."""
    served = serve(script, data=data_folder(path, max_bytes), **options)
    keeper = served.app.keeper
    assert isinstance(keeper, Keeper)
    async with listening(served.app) as address, keeper.keeping():
        yield served, address


def http_client(address: str) -> httpx.AsyncClient:
    """Make a client that waits: what it keeps is synced, for which a busy disk takes longer than its usual 5 s."""
    return httpx.AsyncClient(base_url=f"http://{address}", timeout=None)


def client_of(address: str, key: str = "none") -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"http://{address}/v1", api_key=key, max_retries=0)


async def until_ended(client: AsyncOpenAI, batch_id: str) -> Batch:
    """Ask until the batch has ended."""
    while (batch := await client.batches.retrieve(batch_id)).status not in ENDED:
        pass
    return batch


async def answers(client: AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """Return the lines of an output or error file."""
    if file_id is None:
        return []
    content = await client.files.content(file_id)
    return [json.loads(each) for each in content.text.splitlines()]
