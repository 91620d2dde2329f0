"""A client of /v1/files and /v1/batches that goes on asking while a router is away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from time import perf_counter

import httpx

from kvferry.common.errors import ConfigError

ENDED = {"completed", "failed", "expired", "cancelled"}
_POLL_S = 0.1
_AWAY_S = 60.0  # until a router is back

JsonObject = dict[str, object]


def line(custom_id: str, model: str, prompt: str, num_tokens: int) -> JsonObject:
    body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


class BatchClient:
    """One client."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def start(self, lines: Sequence[JsonObject]) -> str:
        """Upload a batch and start it; returns its id."""
        data = b"".join(json.dumps(each).encode() + b"\n" for each in lines)
        uploaded = await self._http.post("/v1/files", files={"file": ("in.jsonl", data)}, data={"purpose": "batch"})
        body = {
            "input_file_id": _checked(uploaded)["id"],
            "endpoint": "/v1/completions",
            "completion_window": "24h",
        }
        return str(_checked(await self._http.post("/v1/batches", json=body))["id"])

    async def batch(self, batch_id: str) -> JsonObject:
        """Return the batch, from whichever router answers next."""
        began_s = perf_counter()
        while True:
            try:
                return _checked(await self._http.get(f"/v1/batches/{batch_id}"))
            except httpx.TransportError:
                if perf_counter() - began_s > _AWAY_S:
                    raise
                await asyncio.sleep(_POLL_S)

    async def until(self, batch_id: str, num_done: int) -> JsonObject:
        """Wait until so many lines are done, or the batch has ended."""
        while (batch := await self.batch(batch_id))["status"] not in ENDED and done_of(batch) < num_done:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        return batch

    async def cancel(self, batch_id: str) -> JsonObject:
        """Cancel a batch, and wait for its end."""
        _checked(await self._http.post(f"/v1/batches/{batch_id}/cancel"))
        return await self.until(batch_id, 1 << 62)

    async def answers(self, file_id: object) -> list[JsonObject]:
        """Return the lines of an output or error file; none without one."""
        if file_id is None:
            return []
        content = await self._http.get(f"/v1/files/{file_id}/content")
        return [json.loads(each) for each in content.content.splitlines()]


def done_of(batch: JsonObject) -> int:
    counts = batch["request_counts"]
    assert isinstance(counts, dict)
    return int(counts["completed"] + counts["failed"])


def _checked(answer: httpx.Response) -> JsonObject:
    if answer.status_code != 200:
        raise ConfigError(f"{answer.request.url.path}: {answer.status_code} {answer.text[:200]}")
    found: JsonObject = answer.json()
    return found
