"""A file's content by ranges: what RFC 9110 says of the header, and errors in the API's shape."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import FileResponse

from kvferry.router.batches.files import FileStore

from .batch_server import batch_server, client_of, http_client

DATA = b"0123456789"


@asynccontextmanager
async def file_of(path: Path, data: bytes) -> AsyncIterator[tuple[httpx.AsyncClient, str]]:
    """Yield a client, and the path of a file's content."""
    async with batch_server(path) as (_, address), client_of(address) as openai:
        uploaded = await openai.files.create(file=data, purpose="batch")
        async with http_client(address) as client:
            yield client, f"/v1/files/{uploaded.id}/content"


@pytest.mark.parametrize("is_open", [True, False])
async def test_a_file_that_is_deleted_while_it_is_asked_for(
    is_open: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is whole or not there, whichever came first."""
    place, method = (FileResponse, "__call__") if is_open else (FileStore, "path")
    found = getattr(place, method)

    def after_deleting(self: Any, *args: Any) -> Any:
        for each in tmp_path.rglob("*.data"):
            each.unlink()
        return found(self, *args)

    async with file_of(tmp_path, DATA) as (client, path):
        monkeypatch.setattr(place, method, after_deleting)
        answer = await client.get(path)
    if is_open:
        assert (answer.status_code, answer.content) == (200, DATA)
    else:
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "file_not_found"


async def test_a_range_that_is_not_understood_is_ignored(tmp_path: Path) -> None:
    async with file_of(tmp_path, DATA) as (client, path):
        for asked in ("bytes=zz", "items=0-1", "bytes", "bytes=", "bytes=-", "bytes=5-2", "bytes=99-5", "bytes=--5",
                      "bytes=0-1,x", "bytes=+1-2", "bytes=1_0-", "0-1"):  # fmt: skip
            answer = await client.get(path, headers={"range": asked})
            assert (answer.status_code, answer.content) == (200, DATA), asked


async def test_what_a_file_has_of_the_ranges_is_sent(tmp_path: Path) -> None:
    async with file_of(tmp_path, DATA) as (client, path):
        for asked, content, told in (
            ("bytes=2-4", b"234", "2-4"), ("bytes=7-", b"789", "7-9"), ("bytes=-3", b"789", "7-9"),
            ("Bytes= 8-99", b"89", "8-9"), ("bytes=-99", DATA, "0-9"), ("bytes=1-1, 50-60", b"1", "1-1"),
        ):  # fmt: skip
            answer = await client.get(path, headers={"range": asked})
            assert (answer.status_code, answer.content) == (206, content), asked
            assert answer.headers["content-range"] == f"bytes {told}/10"
        several = await client.get(path, headers={"range": "bytes=0-1,5-6"})
        assert several.status_code == 206 and several.headers["content-type"].startswith("multipart/byteranges")


@pytest.mark.parametrize("asked", ["bytes=99999-", "bytes=10-", "bytes=-0", "bytes=10-12,20-"])
async def test_ranges_past_the_file_are_an_error_that_tells_its_size(tmp_path: Path, asked: str) -> None:
    async with file_of(tmp_path, DATA) as (client, path):
        answer = await client.get(path, headers={"range": asked})
        assert answer.status_code == 416 and answer.headers["content-range"] == "bytes */10"
        assert answer.headers["content-type"] == "application/json"
        error = answer.json()["error"]
        assert error["code"] == "range_not_satisfiable" and "10 bytes" in error["message"]
        assert (await client.get(path, headers={"range": asked, "if-range": '"other"'})).content == DATA


async def test_a_range_of_a_file_that_has_changed_is_ignored(tmp_path: Path) -> None:
    async with file_of(tmp_path, DATA) as (client, path):
        etag = (await client.get(path)).headers["etag"]
        for name, status in ((etag, 206), ('"other"', 200)):
            answer = await client.get(path, headers={"range": "bytes=0-1", "if-range": name})
            assert answer.status_code == status
