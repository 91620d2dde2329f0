"""What `/v1/responses` answered is found by every router of a folder, in its bounds of size and time."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from structlog.testing import capture_logs

from kvferry.common.errors import ConfigError, RequestError
from kvferry.router.kept.answers import KeptAnswers
from kvferry.router.responses.conversation import Asked, joined_arrays
from kvferry.router.responses.kept import MAX_BYTES_OF_ONE, KeptResponses
from kvferry.router.responses.store import MAX_AGE_S, FolderStore, MemoryStore, ResponseStore
from kvferry.router.responses.tools import OwnName
from kvferry.tests.fake_clock import FakeClock

from ..fakes import Script, Served, serve

PATH = "/v1/responses"
MESSAGES: list[dict[str, object]] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "wö"}]
NAMES = {"notes__read": OwnName("notes", "read"), "patch": OwnName(None, "patch", is_custom=True)}


def router(folder: Path, text: str = "Hello", **options: Any) -> Served:
    return serve(Script(text), kept_answers=KeptAnswers(folder), **options)


async def say(served: Served, **body: Any) -> dict[str, Any]:
    async with served.client() as client:
        response = await client.post(PATH, json={"input": "hi", **body})
    return {**response.json(), "http": response.status_code}


def id_in(text: str) -> str:
    return next(part for part in text.split('"') if part.startswith("resp_"))


def prompt(served: Served) -> list[int]:
    return list(served.dispatcher.requests[-1].prompt_token_ids)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_another_router_goes_on_with_what_one_said(tmp_path: Path, is_streamed: bool) -> None:
    first, second, alone = router(tmp_path), router(tmp_path), serve(Script("Hello"))
    async with first.client() as client:
        response_id = id_in((await client.post(PATH, json={"input": "hi", "stream": is_streamed})).text)
    [path] = (tmp_path / "responses").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert (await say(second, input="more", previous_response_id=response_id))["http"] == 200
    said = await say(alone)
    await say(alone, input="more", previous_response_id=said["id"])
    assert prompt(second) == prompt(alone)
    async with second.client() as client:
        assert (await client.get(f"{PATH}/{response_id}")).json()["id"] == response_id
        assert (await client.delete(f"{PATH}/{response_id}")).status_code == 200
    assert (await say(first, previous_response_id=response_id))["error"]["code"] == "previous_response_not_found"


async def test_a_client_that_comes_back_to_another_router_goes_on_in_its_conversation(tmp_path: Path) -> None:
    first = router(tmp_path)
    said = await say(first)
    body = {"input": "more", "previous_response_id": said["id"]}
    key = {"idempotency-key": "k"}
    async with first.client() as client:
        answered = (await client.post(PATH, json=body, headers=key)).json()
    second = router(tmp_path, "another text")
    async with second.client() as client:
        again = await client.post(PATH, json=body, headers=key)
    assert again.headers["idempotent-replayed"] == "true" and again.json()["output"] == answered["output"]
    assert second.dispatcher.requests == []
    third = router(tmp_path)
    assert (await say(third, input="and", previous_response_id=answered["id"]))["http"] == 200
    assert len(prompt(third)) > len(prompt(first))


@pytest.mark.parametrize("body", [{}, {"store": True}, {"stream": True}])
async def test_nothing_is_kept_where_the_operator_says_so(tmp_path: Path, body: dict[str, Any]) -> None:
    served = router(tmp_path, stores_responses=False)
    async with served.client() as client:
        text = (await client.post(PATH, json={"input": "hi", **body})).text
        assert '"store":false' in text and '"store":true' not in text
        response_id = id_in(text)
        assert (await client.get(f"{PATH}/{response_id}")).status_code == 404
        assert (await client.delete(f"{PATH}/{response_id}")).status_code == 404
    assert not (tmp_path / "responses").exists()
    refused = await say(served, previous_response_id=response_id)
    assert (refused["http"], refused["error"]["code"]) == (400, "previous_response_not_found")


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ResponseStore:
    return FolderStore(tmp_path / "responses") if request.param == "folder" else MemoryStore(FakeClock(0.0))


async def test_what_is_written_is_read_until_it_is_deleted(store: ResponseStore) -> None:
    kept = KeptResponses(store)
    items: list[dict[str, object]] = [
        {"id": "msg_a_0", "type": "message"},
        {"id": "msg_a_1", "type": "message", "n": 2**70},
    ]
    given = {"id": "msg_a_in0", "type": "message"}
    asked = Asked(msgspec.json.encode([given]), "k")
    kept.keeper("resp_a", b"t", MESSAGES, items, b'{"a":1}', NAMES, asked)()
    kept.keeper("resp_b", b"t", MESSAGES[:1])()
    assert kept.find("resp_a", b"t") == (MESSAGES, NAMES, msgspec.json.encode([given, *items]))
    assert kept.find("resp_b", b"t") == (MESSAGES[:1], {}, b"[]")
    assert [(name, msgspec.json.decode(item)) for name, item in kept.input("resp_a", b"t")] == [(given["id"], given)]
    found = kept.find_items(["msg_a_1", "msg_b_0", "msg_a_in0", "msg_a_in1", "a", None, {}], b"t")
    assert {name: msgspec.json.decode(item) for name, item in found.items()} == {
        "msg_a_1": items[1],
        "msg_a_in0": given,
    }
    assert kept.num_bytes("resp_a", b"t") > kept.num_bytes("resp_b", b"t") > kept.num_bytes("resp_c", b"t") == 0
    assert kept.response("resp_a", b"t") == b'{"a":1}'
    kept.keeper("resp_a", b"t", MESSAGES[:1], response=b"{}")()  # told again
    assert kept.response("resp_a", b"t") == b"{}"
    for response_id, tenant in (("resp_a", b"u"), ("resp_c", b"t"), ("../x", b"t"), ("\ud800", b"t"), ("", b"t")):
        with pytest.raises(RequestError):
            kept.find(response_id, tenant)
    assert kept.forget("resp_a", b"t") == "" and kept.forget("resp_b", b"t") == ""
    with pytest.raises(RequestError):
        kept.forget("resp_a", b"t")


@pytest.mark.parametrize(
    "arrays", [(), (b"[]", b"[]"), (b"[1]", b"[]"), (b"[]", b"[1]"), (b"[1,2]", memoryview(b"[3]"))]
)
def test_arrays_are_joined(arrays: tuple[bytes | memoryview, ...]) -> None:
    expected = [each for array in arrays for each in msgspec.json.decode(array)]
    assert msgspec.json.decode(joined_arrays(*arrays)) == expected


async def test_what_a_response_answers_is_kept_while_it_changes(store: ResponseStore) -> None:
    kept = KeptResponses(store)
    kept.keep_state("resp_a", b"", b'{"status":"queued"}', Asked(b'[{"id":"msg_a_in0"}]', "k"))
    kept.change_state("resp_a", b"", b'{"status":"failed"}')
    assert [name for name, _ in kept.input("resp_a", b"")] == ["msg_a_in0"]
    assert kept.response("resp_a", b"") == b'{"status":"failed"}' and kept.forget("resp_a", b"") == "k"


async def test_a_long_input_is_not_kept(store: ResponseStore) -> None:
    kept, long = KeptResponses(store), Asked(b'["%b"]' % (b"x" * MAX_BYTES_OF_ONE))
    kept.keeper("resp_a", b"", MESSAGES, asked=long)()
    assert not _is_kept(kept, "resp_a")
    with pytest.raises(RequestError, match=r"takes more than .* send it without 'background'"):
        kept.keep_state("resp_a", b"", b"{}", long)


async def test_a_file_that_is_not_whole_is_not_there(tmp_path: Path) -> None:
    kept = KeptResponses(FolderStore(tmp_path / "responses"))
    kept.keeper("resp_a", b"", MESSAGES, (), b"{}", NAMES)()
    [path] = (tmp_path / "responses").iterdir()
    data = path.read_bytes()
    for broken in (b"", b"k", data[:-1], data + b"x", b"kvr0" + data[4:], bytes(len(data)), data[:20]):
        path.write_bytes(broken)
        with pytest.raises(RequestError, match="not kept here"):
            kept.find("resp_a", b"")
    path.write_bytes(data)
    assert kept.find("resp_a", b"") == (MESSAGES, NAMES, b"[]")


async def test_names_of_before_there_were_custom_tools_are_read(store: ResponseStore) -> None:
    kept = KeptResponses(store)
    kept.keeper("resp_a", b"", MESSAGES, names={"notes__read": ("notes", "read")})()  # type: ignore[dict-item]
    assert kept.find("resp_a", b"")[1] == {"notes__read": OwnName("notes", "read")}


async def test_the_old_and_the_most_are_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "responses"
    store = FolderStore(folder, max_bytes=35_000)
    kept = KeptResponses(store)
    for number in range(5):
        kept.keeper(f"resp_{number}", b"", [{"role": "user", "content": "x" * 10_000}])()
        path = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(path, (time.time() - 100 + number,) * 2)
    store.sweeper.sweep()
    assert [number for number in range(5) if _is_kept(kept, f"resp_{number}")] == [2, 3, 4]
    for path in folder.iterdir():
        os.utime(path, (time.time() - MAX_AGE_S - 1,) * 2)
    assert not _is_kept(kept, "resp_4") and len(list(folder.iterdir())) == 3
    store.sweeper.sweep()
    assert not list(folder.iterdir())
    folder.rmdir()
    store.sweeper.sweep()
    assert not _is_kept(kept, "resp_4")


async def test_writing_sweeps(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "responses")
    (tmp_path / "responses" / "old").touch()
    os.utime(tmp_path / "responses" / "old", (0, 0))
    store.write("new", b"x")
    assert store.sweeper.sweeping is not None
    await store.sweeper.sweeping
    assert [path.name for path in (tmp_path / "responses").iterdir()] == ["new"]


def test_a_folder_that_cannot_be_listed_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path / "responses")

    def refused(path: Path) -> Iterator[os.DirEntry[str]]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refused)
    with capture_logs() as logs:
        store.sweeper.sweep()
    [told] = logs
    assert told["event"] == "folder_not_swept" and str(tmp_path) in told["reason"]


async def test_a_full_disk_costs_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = router(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    said = await say(served)
    assert said["http"] == 200 and said["output"][0]["content"][0]["text"] == "Hello"
    assert not list((tmp_path / "responses").iterdir())
    assert (await say(served, previous_response_id=said["id"]))["http"] == 400


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
async def test_a_disk_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    served = router(tmp_path)
    said = await say(served)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    async with served.client() as client:

        def calls() -> list[Awaitable[httpx.Response]]:
            return [
                client.get(f"{PATH}/{said['id']}"),
                client.get(f"{PATH}/{said['id']}/input_items"),
                client.post(PATH, json={"input": "hi", "previous_response_id": said["id"]}),
                client.delete(f"{PATH}/{said['id']}"),
            ]

        with monkeypatch.context() as patch:
            patch.setattr(FolderStore, "read", fail)
            answers = [await each for each in calls()]
        with monkeypatch.context() as patch:
            patch.setattr(FolderStore, "delete", fail)
            answers.append(await client.delete(f"{PATH}/{said['id']}"))
        for answer in answers:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
            assert os.strerror(number) in answer.json()["error"]["message"]
        assert [(await each).status_code for each in calls()] == [200] * 4


def test_what_a_disk_cannot_read_ends_the_call_alone(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    (tmp_path / "name").symlink_to("/proc/self/mem")  # nothing is at its beginning
    with pytest.raises(OSError, match="Input/output error"):
        store.read("name")


def test_a_folder_that_can_not_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "responses").touch()
    with pytest.raises(ConfigError, match=r"answers_dir: cannot make .*responses"):
        FolderStore(tmp_path / "responses")


def _is_kept(kept: KeptResponses, response_id: str) -> bool:
    try:
        kept.find(response_id, b"")
    except RequestError:
        return False
    return True
