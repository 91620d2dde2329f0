"""Hostile uploads: whatever comes is a file, or a refusal in OpenAI's shape, and nothing is left on disk."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvferry.common.errors import RequestError
from kvferry.router.batches import upload
from kvferry.router.batches.folder import DataFolder

from .batch_server import batch_server, data_folder, http_client

BOUNDARY = "b0undary"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def form(*parts: tuple[str, bytes]) -> bytes:
    pieces = [f"--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data for head, data in parts]
    return b"\r\n".join([*pieces, f"--{BOUNDARY}--\r\n".encode()])


FILE = ('name="file"; filename="a.jsonl"', b"{}\n")
PURPOSE = ('name="purpose"', b"batch")
REFUSED: list[tuple[bytes, dict[str, str], int, str]] = [
    (b"{}", {"content-type": "application/json"}, 415, "multipart/form-data"),
    (b"", {"content-type": "multipart/form-data"}, 415, "with a boundary"),
    (form(FILE, PURPOSE), {**FORM, "content-encoding": "gzip"}, 415, "Content-Encoding"),
    (b"", FORM, 400, "ends in its middle"),
    (b"junk", FORM, 400, "no multipart form"),
    (form(FILE, PURPOSE)[:-9], FORM, 400, "ends in its middle"),
    (form(PURPOSE), FORM, 400, "file: the form has no such part"),
    (form(FILE), FORM, 400, "purpose: "),
    (form(FILE, ('name="purpose"', b"fine-tune")), FORM, 400, "only 'batch' is"),
    (form(FILE, FILE, PURPOSE), FORM, 400, "more than one file"),
    (form(PURPOSE, PURPOSE), FORM, 400, "once each"),
    (form(('name="other"', b"1")), FORM, 400, "a field 'other'"),
    (form(("nothing", b"1")), FORM, 400, "a field ''"),
    (form(('name="purpose"', b"x" * 2000)), FORM, 400, "longer than 1024 bytes"),
    (form(FILE, PURPOSE, ('name="expires_after[seconds]"', b"-1")), FORM, 400, "expires_after: needs"),
    (form(*[PURPOSE] * 20), FORM, 400, "once each"),
    (form(('name="file"' + "x" * 9000, b"")), FORM, 400, "no multipart form"),
]


def stored_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize(("body", "headers", "status", "text"), REFUSED)
async def test_a_wrong_upload_is_refused_and_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, body: bytes, headers: dict[str, str], status: int, text: str
) -> None:
    async with batch_server(tmp_path) as (_, address), http_client(address) as client:
        answer = await client.post("/v1/files", content=body, headers=headers)
        assert answer.status_code == status, answer.text
        assert text in answer.json()["error"]["message"]
        assert (await client.get("/v1/files")).json()["data"] == []
    assert not stored_in(tmp_path)
    assert not [each for each in caplog.records if each.levelname == "WARNING"]  # the client is told, and nobody else


async def test_names_of_files_are_made_harmless(tmp_path: Path) -> None:
    async with batch_server(tmp_path) as (_, address), http_client(address) as client:
        for name, kept in (
            ("../../etc/x", "x"),
            ("C:\\\\a\\\\b", "b"),
            ("", "file"),
            ("a\tb", "ab"),
            ("%22a%0D%0Ab%22 100%25.jsonl", '"ab" 100%25.jsonl'),
        ):
            body = form((f'name="file"; filename="{name}"', b"1"), PURPOSE)
            answer = await client.post("/v1/files", content=body, headers=FORM)
            assert answer.json()["filename"] == kept
            content = await client.get(f"/v1/files/{answer.json()['id']}/content")
            assert content.content == b"1" and "attachment" in content.headers["content-disposition"]


async def test_a_web_page_may_upload_where_it_may_ask(tmp_path: Path) -> None:
    server = batch_server(tmp_path, allowed_origins=("https://ours",))
    async with server as (_, address), http_client(address) as client:
        for origin, status in (("https://ours", 200), ("https://other", 403), ("null", 403)):
            answer = await client.post("/v1/files", content=form(FILE, PURPOSE), headers={**FORM, "origin": origin})
            assert answer.status_code == status


@pytest.mark.parametrize("path", ["x", "..%2Fbatch", "file-" + "z" * 24, "file-" + "0" * 24, "%00", "a" * 5000])
async def test_an_id_that_is_none_finds_nothing(tmp_path: Path, path: str) -> None:
    async with batch_server(tmp_path) as (_, address), http_client(address) as client:
        for url in (f"/v1/files/{path}", f"/v1/files/{path}/content", f"/v1/batches/{path}"):
            assert (await client.get(url)).status_code == 404


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=x", "limit=-1", "limit=1e3", "after=x", "limit=99999999", "order=up"]
)
async def test_a_wrong_page_is_refused(tmp_path: Path, query: str) -> None:
    async with batch_server(tmp_path) as (_, address), http_client(address) as client:
        assert (await client.get(f"/v1/files?{query}")).status_code == 400


async def test_the_folder_has_a_bound(tmp_path: Path) -> None:
    server = batch_server(tmp_path, max_bytes=100_000)
    async with server as (_, address), http_client(address) as client:

        async def post(num_bytes: int, **kind: Any) -> httpx.Response:
            body = form(('name="file"; filename="a"', b"x" * num_bytes), PURPOSE)
            return await client.post("/v1/files", headers=FORM, **{"content": body, **kind})

        assert (await post(60_000)).status_code == 200
        refused = await post(60_000)
        assert refused.status_code == 507 and refused.json()["error"]["code"] == "insufficient_storage"
        assert refused.headers["x-should-retry"] == "false"
        [stored] = (await client.get("/v1/files")).json()["data"]
        await client.delete(f"/v1/files/{stored['id']}")
        assert (await post(60_000)).status_code == 200


async def test_uploads_side_by_side_have_no_more_room_than_one(tmp_path: Path) -> None:
    folder = data_folder(tmp_path, 100_000)
    body = form(('name="file"; filename="a"', b"x" * 60_000), PURPOSE)
    turns = [asyncio.Event(), asyncio.Event()]
    headers = {name.encode(): value.encode() for name, value in FORM.items()}
    begun = asyncio.Semaphore(0)

    async def store(turn: asyncio.Event) -> None:
        async def receive() -> dict[str, Any]:
            begun.release()
            await turn.wait()
            return {"type": "http.request", "body": body, "more_body": False}

        async with upload.received(headers, receive, folder) as (_, part):
            folder.place(part, folder.files / part.name)

    uploads = [asyncio.create_task(store(turn)) for turn in turns]
    for _ in uploads:
        await begun.acquire()  # both have found room
    turns[0].set()
    await uploads[0]
    turns[1].set()
    with pytest.raises(RequestError) as refused:
        await uploads[1]
    assert refused.value.status == 507 and folder.num_bytes() == 60_000 and not folder.num_incoming
    next(folder.files.iterdir()).unlink()
    await store(turns[1])
    assert folder.num_bytes() == 60_000


async def test_a_full_disk_is_told_and_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: DataFolder, target: Path, data: bytes, *, lasts: bool = True) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken(file: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async with batch_server(tmp_path) as (_, address), http_client(address) as client:
        kept = (await client.post("/v1/files", content=form(FILE, PURPOSE), headers=FORM)).json()
        batch = {"input_file_id": kept["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        before = stored_in(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(DataFolder, "write", full)
            for answer in (
                await client.post("/v1/files", content=form(FILE, PURPOSE), headers=FORM),
                await client.post("/v1/batches", json=batch),
            ):
                assert (answer.status_code, answer.json()["error"]["code"]) == (507, "insufficient_storage")
                assert "the disk" in answer.json()["error"]["message"]
        monkeypatch.setattr(upload, "sync", broken)
        assert (await client.post("/v1/files", content=form(FILE, PURPOSE), headers=FORM)).status_code == 503
        assert stored_in(tmp_path) == before


async def test_a_file_that_is_too_large_is_refused_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "MAX_FILE_BYTES", 2**20)

    async def pieces() -> Any:
        yield form(('name="file"; filename="a"', b""))[: -len(f"\r\n--{BOUNDARY}--\r\n")]
        for _ in range(64):
            yield b"x" * 2**16

    async with batch_server(tmp_path) as (_, address), http_client(address) as client:
        try:
            answer = await client.post("/v1/files", content=pieces(), headers=FORM)
        except httpx.TransportError:
            pass  # it was closed while more was being sent
        else:
            assert answer.status_code == 413
        assert (await client.get("/v1/files")).json()["data"] == []


async def test_a_client_that_stops_sending_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "SILENCE_S", 0.05)
    async with batch_server(tmp_path) as (_, address):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        head = (
            f"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\ncontent-type: {FORM['content-type']}\r\n\r\n"
        )
        writer.write(head.encode())
        assert b" 408 " in await reader.readline()
        writer.close()


def test_a_form_is_the_same_however_it_is_cut() -> None:
    import io

    body = form(('name="file"; filename="a"', b"one\r\n--b0undar\r\ntwo"), PURPOSE)
    for seed in range(100):
        rng, out = random.Random(seed), io.BytesIO()
        found = upload.Form(BOUNDARY.encode(), out, 1000)
        start = 0
        while start < len(body):
            end = start + rng.randint(1, 1 + seed)
            found.feed(body[start:end])
            start = end
        assert found.check() is None and out.getvalue() == b"one\r\n--b0undar\r\ntwo" and found.filename == "a"
