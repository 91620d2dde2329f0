"""A disk that fails, or is mounted anew for reading only, while files and batches are served: callers are told why."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
from structlog.testing import capture_logs

from kvferry.router.batches import keeper as keeper_module
from kvferry.router.batches import run
from kvferry.router.batches.journal import Journal
from kvferry.router.batches.keeper import Keeper
from kvferry.router.batches.record import BatchStatus

from ..fakes import listening, serve
from .batch_server import data_folder, http_client
from .test_batch_keeper import ended
from .test_batch_run import Caller, create, deps_of
from .test_batch_upload import FILE, FORM, PURPOSE, form

REASONS = [errno.EROFS, errno.EACCES, errno.EIO]


def failing(number: int) -> Any:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number), "/the/folder")

    return fail


def check_told(answer: httpx.Response, number: int) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (503, "storage_unavailable", "server_error")
    assert os.strerror(number) in error["message"] and "/the/folder" not in error["message"]
    assert "retry-after" in answer.headers


@pytest.mark.parametrize("number", REASONS, ids=errno.errorcode.get)
async def test_who_wants_something_kept_is_told_why_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    served = serve(data=data_folder(tmp_path))  # without a keeper: the batch does not end
    async with listening(served.app) as address, http_client(address) as client:
        kept = (await client.post("/v1/files", content=form(FILE, PURPOSE), headers=FORM)).json()
        asked = {"input_file_id": kept["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = (await client.post("/v1/batches", json=asked)).json()

        async def changes() -> list[httpx.Response]:
            return [
                await client.post("/v1/files", content=form(FILE, PURPOSE), headers=FORM),
                await client.post("/v1/batches", json=asked),
                await client.post(f"/v1/batches/{batch['id']}/cancel"),
                await client.delete(f"/v1/files/{kept['id']}"),
            ]

        with monkeypatch.context() as patch, capture_logs() as logs:
            for name in ("mkdir", "touch", "replace", "unlink"):
                patch.setattr(Path, name, failing(number))
            for answer in await changes():
                check_told(answer, number)
            assert (await client.get("/v1/files")).json()["data"] == [kept]
            assert (await client.get(f"/v1/batches/{batch['id']}")).json()["status"] == "validating"
        told = [each for each in logs if each["event"] == "request_error"]
        assert len(told) == 4 and all("/the/folder" in each["reason"] for each in told)
        assert not any("exc_info" in each for each in logs)
        assert [answer.status_code for answer in await changes()] == [200] * 4


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO], ids=errno.errorcode.get)
async def test_who_wants_something_shown_is_told_why_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    served = serve(data=data_folder(tmp_path))
    async with listening(served.app) as address, http_client(address) as client:
        kept = (await client.post("/v1/files", content=form(FILE, PURPOSE), headers=FORM)).json()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", failing(number))
            for path in (f"/v1/files/{kept['id']}", f"/v1/files/{kept['id']}/content", f"/v1/batches/batch_{'0' * 32}"):
                check_told(await client.get(path), number)
        assert (await client.get(f"/v1/files/{kept['id']}")).json() == kept


async def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening(serve(data=data_folder(tmp_path)).app) as address, http_client(address) as client:
        for number in (errno.ENOSPC, errno.EDQUOT):
            monkeypatch.setattr(Path, "replace", failing(number))
            with capture_logs() as logs:
                answer = await client.post("/v1/files", content=form(FILE, PURPOSE), headers=FORM)
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "insufficient_storage")
            assert [each["log_level"] for each in logs if each["event"] == "request_error"] == ["warning"]


@pytest.mark.parametrize(("owner", "name"), [(Journal, "append"), (run, "read_body")], ids=["answers", "lines"])
async def test_a_batch_goes_on_when_the_disk_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    monkeypatch.setattr(keeper_module, "RETRY_S", 0.0)
    deps = deps_of(tmp_path, Caller())
    keeper, batch_id = Keeper(deps), create(deps, 3)
    with capture_logs() as logs:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing(errno.EIO))
            async with asyncio.timeout(10), keeper.keeping():
                while len([each for each in logs if each["event"] == "batch_failed"]) < 2:
                    keeper.look_now()
                    await asyncio.sleep(0.001)
        async with keeper.keeping():
            assert (await ended(keeper, deps, batch_id)).status is BatchStatus.COMPLETED
    failures = [each for each in logs if each["event"] == "batch_failed"]
    assert all("Input/output error" in each["reason"] and "exc_info" not in each for each in failures)


async def test_a_folder_that_cannot_be_looked_at_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deps, num_looks = deps_of(tmp_path, Caller()), 0

    def fail() -> NoReturn:
        nonlocal num_looks
        num_looks += 1
        number = errno.EACCES if num_looks <= 3 else errno.EIO
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(deps.store, "unended", fail)
    keeper = Keeper(deps)
    with capture_logs() as logs:
        async with asyncio.timeout(10), keeper.keeping():
            while num_looks < 6:
                keeper.look_now()
                await asyncio.sleep(0.001)
    told = [each for each in logs if each["event"] == "batches_folder_failed"]
    assert [each["reason"].split("]")[0] for each in told] == [f"[Errno {errno.EACCES}", f"[Errno {errno.EIO}"]
    assert not any("exc_info" in each for each in told)


async def test_a_bug_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> NoReturn:
        raise AssertionError  # without a text

    deps = deps_of(tmp_path, Caller())
    monkeypatch.setattr(deps.store, "unended", fail)
    keeper = Keeper(deps)
    with capture_logs() as logs:
        async with keeper.keeping():
            await asyncio.sleep(0.1)
    [told] = [each for each in logs if each["event"] == "batches_folder_failed"]
    assert isinstance(told["exc_info"], AssertionError) and told["log_level"] == "error"
