"""Background responses where disk or machine fail: what is damaged ends alone, and what had no room is told later."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from kvferry.router.kept.answer_log import AnswerLog
from kvferry.router.kept.answers import KEEP_S, KeptAnswers
from kvferry.router.responses import background
from kvferry.router.responses import runs as background_runs
from kvferry.router.responses.conversation import Earlier
from kvferry.router.responses.kept import KeptResponses
from kvferry.router.responses.store import FolderStore
from kvferry.router.responses.task_folder import Task, TaskFolder

from ..fakes import Script, Served
from .backgrounds import BODY, begin, call, damage, ended, no_room, router, runs, shown, text_of, until


@pytest.fixture(autouse=True)
def looking_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(background, "_GROWS_WITHIN_S", 0.001)


async def left_behind(folder: Path, **body: Any) -> dict[str, Any]:
    """Begin a response whose router ends in the middle of it."""
    first = router(folder, script=Script("Hello, world", hold_at=4))
    async with runs(first).keeping():
        state = await begin(first, **body)
        await first.dispatcher.held.wait()
    return state


async def left_streaming(folder: Path) -> dict[str, Any]:
    """Begin one that streams, and return its first state."""
    first = router(folder, script=Script("Hello, world", hold_at=4))
    async with runs(first).keeping():
        following = asyncio.create_task(call(first, "POST", json=BODY | {"stream": True}))
        await first.dispatcher.held.wait()
        [path] = await asyncio.to_thread(lambda: list((folder / "events").iterdir()))
    following.cancel()
    return dict(events_of(path.read_text())[0]["response"])


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n") if line.startswith("data: ")]


async def told(served: Served, state: dict[str, Any]) -> list[dict[str, Any]]:
    response = await call(served, "GET", f"/{state['id']}?stream=true")
    assert response.status_code == 200, response.text
    return events_of(response.text)


def told_text(events: list[dict[str, Any]]) -> str:
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


async def nothing_is_left(folder: Path) -> bool:
    return not list((folder / "tasks").iterdir())


async def test_a_damaged_state_is_kept_no_more_and_ends_nobody_elses_response(tmp_path: Path) -> None:
    damaged = await left_behind(tmp_path, metadata={"k": "v" * 500})
    [path] = (tmp_path / "responses").iterdir()
    damage(path)
    whole = await left_behind(tmp_path)
    second = router(tmp_path)
    async with runs(second).keeping():
        assert text_of(await ended(second, whole)) == "Hello, world"
        await until(lambda: nothing_is_left(tmp_path))
        later = await left_behind(tmp_path)
        assert text_of(await ended(second, later)) == "Hello, world"
    for method, path_of in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
        assert (await call(second, method, f"/{damaged['id']}{path_of}")).status_code == 404


async def test_an_error_that_nobody_has_foreseen_keeps_nobody_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background_runs, "RETRY_S", 0.05)
    first, other = await left_behind(tmp_path), await left_behind(tmp_path)
    second, third = router(tmp_path), router(tmp_path)
    states = runs(second)._runs.states  # type: ignore[union-attr]
    has_to_go_on, failed = states.has_to_go_on, list[Task]()

    def fails_once(task: Task, events: object) -> bool:
        if task.response_id == first["id"] and not failed:
            failed.append(task)
            raise ZeroDivisionError
        return has_to_go_on(task, events)  # type: ignore[arg-type]

    monkeypatch.setattr(states, "has_to_go_on", fails_once)
    async with runs(second).keeping():
        assert text_of(await ended(second, other)) == "Hello, world"
        assert text_of(await ended(third, first)) == "Hello, world"
    assert failed


async def test_answers_of_tasks_outlive_any_time_without_a_router(tmp_path: Path) -> None:
    def sweep_much_later() -> None:
        for path in tmp_path.rglob("*"):
            if path.is_file():
                os.utime(path, (time.time() - KEEP_S - 100.0,) * 2)
        KeptAnswers(tmp_path).sweeper.sweep()

    state = await left_streaming(tmp_path)
    clients = tmp_path / ("0" * 40)
    clients.touch()
    await asyncio.to_thread(sweep_much_later)  # as the first answer has it done that a new router takes
    assert not clients.exists()
    second = router(tmp_path)
    async with runs(second).keeping():
        assert told_text(await told(second, state)) == "Hello, world"
        assert (await shown(second, state))["status"] == "completed"
    await asyncio.to_thread(sweep_much_later)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".own")]  # it leaves as others do, now


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
async def test_an_answer_that_had_no_room_at_its_end_is_told_when_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    """There is room for the state, and none for the answer, which is longer."""
    monkeypatch.setattr(background_runs, "RETRY_S", 0.02)
    served = router(tmp_path, script=Script("Hello, world", hold_at=4))
    write = FolderStore.write
    async with runs(served).keeping():
        if streams:
            following = asyncio.create_task(call(served, "POST", json=BODY | {"stream": True}))
            await served.dispatcher.held.wait()
            [path] = await asyncio.to_thread(lambda: list((tmp_path / "events").iterdir()))
            state = events_of(path.read_text())[0]["response"]
        else:
            state = await begin(served)
            await served.dispatcher.held.wait()
        [kept_file] = await asyncio.to_thread(lambda: list((tmp_path / "responses").iterdir()))
        num_bytes = kept_file.stat().st_size

        def short(store: FolderStore, name: str, data: bytes) -> None:
            write(store, name, data) if len(data) <= num_bytes + 100 else no_room()

        monkeypatch.setattr(FolderStore, "write", short)
        served.dispatcher.go.set()
        await asyncio.sleep(0.2)
        assert (await shown(served, state))["status"] == "in_progress"
        monkeypatch.setattr(FolderStore, "write", write)
        response = await ended(served, state)
        assert (response["status"], text_of(response), response["error"]) == ("completed", "Hello, world", None)
        if streams:
            events = events_of((await following).text)
            assert told_text(events) == "Hello, world" and events[-1]["type"] == "response.completed"
            assert await told(served, state) == events
    assert len(served.dispatcher.requests) == 1  # nothing of it is computed again


async def test_what_has_no_room_is_not_told_again_at_every_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background_runs, "RETRY_S", 1.0)
    served = router(tmp_path, script=Script("Hello", hold_at=3))
    tries = []

    def refuse(*_: object) -> None:
        tries.append(time.monotonic())
        no_room()

    async with runs(served).keeping():
        state = await begin(served)
        await served.dispatcher.held.wait()
        with monkeypatch.context() as patch:
            patch.setattr(FolderStore, "write", refuse)
            served.dispatcher.go.set()
            await until(lambda: asyncio.sleep(0, bool(tries)))
            await asyncio.sleep(0.5)  # fifty looks
            assert len(tries) == 1
        assert text_of(await ended(served, state)) == "Hello"


async def test_one_goes_on_when_what_it_goes_on_behind_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background_runs, "RETRY_S", 0.02)
    earlier = (await call(router(tmp_path), "POST", json={"input": "hi"})).json()["id"]
    state = await left_behind(tmp_path, previous_response_id=earlier)
    served, tries = router(tmp_path), list[object]()

    def unreadable(_: KeptResponses, response_id: object, __: bytes) -> Earlier:
        tries.append(response_id)
        raise OSError(errno.EIO, "Input/output error")

    async with runs(served).keeping():
        with monkeypatch.context() as patch:
            patch.setattr(KeptResponses, "find", unreadable)
            await until(lambda: asyncio.sleep(0, len(tries) > 1))
            assert (await shown(served, state))["status"] == "in_progress"
        assert text_of(await ended(served, state)) == "Hello, world"


async def test_a_folder_of_tasks_that_cannot_be_looked_at_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, num_looks = router(tmp_path), 0

    def unreadable(*_: object) -> None:
        nonlocal num_looks
        num_looks += 1
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(TaskFolder, "look", unreadable)
    with capture_logs() as logs:
        async with runs(served).keeping():
            await until(lambda: asyncio.sleep(0, num_looks > 3))
    assert [each["reason"] for each in logs if each["event"] == "background_responses"] == ["Input/output error"]


@pytest.mark.parametrize(("method", "path"), [("POST", "/cancel"), ("DELETE", "")], ids=["cancel", "delete"])
async def test_what_was_put_off_is_ended_for_who_wants_no_more_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, path: str
) -> None:
    served, other = router(tmp_path, script=Script("Hello", hold_at=3)), router(tmp_path)
    async with runs(served).keeping():
        state = await begin(served)
        await served.dispatcher.held.wait()
        with monkeypatch.context() as patch:
            patch.setattr(FolderStore, "write", no_room)
            served.dispatcher.go.set()
            await until(lambda: asyncio.sleep(0, not runs(served)._runs._by_name))  # type: ignore[union-attr]
        assert (await shown(served, state))["status"] == "in_progress"
        assert (await call(other, method, f"/{state['id']}{path}")).status_code == 200
        found = await call(served, "GET", f"/{state['id']}")
        assert found.status_code == 404 if method == "DELETE" else found.json()["status"] == "cancelled"
        assert await nothing_is_left(tmp_path)


@pytest.mark.parametrize("is_full", [False, True], ids=["nearly full", "full"])
async def test_what_has_no_room_for_its_tokens_either_is_not_computed_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    """There is room for no tokens and no answer, and where the disk is not quite full for that it has failed."""
    monkeypatch.setattr(background_runs, "RETRY_S", 0.02)
    served = router(tmp_path, script=Script("Hello, world", hold_at=4))
    write, tries = FolderStore.write, list[int]()

    def short(store: FolderStore, name: str, data: bytes) -> None:
        tries.append(len(data))
        no_room() if is_full or len(tries) == 1 else write(store, name, data)

    async with runs(served).keeping():
        state = await begin(served)
        await served.dispatcher.held.wait()
        with monkeypatch.context() as patch:
            patch.setattr(FolderStore, "write", short)
            patch.setattr(AnswerLog, "_append", no_room)
            served.dispatcher.go.set()
            await until(lambda: asyncio.sleep(0, len(tries) == 2))
            await asyncio.sleep(0.3)
            assert len(tries) == 2  # the answer, and that it has failed
            assert (await shown(served, state))["status"] == ("in_progress" if is_full else "failed")
        response = await ended(served, state)
    if is_full:
        assert (response["status"], text_of(response)) == ("completed", "Hello, world")
    else:
        assert "could not be kept: ask again" in response["error"]["message"]


@pytest.mark.parametrize("is_torn", [False, True], ids=["gone", "torn"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
async def test_one_whose_task_was_lost_has_failed(tmp_path: Path, is_torn: bool, streams: bool) -> None:
    state = await (left_streaming(tmp_path) if streams else left_behind(tmp_path))
    [task] = (tmp_path / "tasks").iterdir()
    if is_torn:
        damage(task)
    else:
        task.unlink()
    second = router(tmp_path)
    async with runs(second).keeping():
        response = await ended(second, state)
    assert response == state | {"status": "failed", "error": response["error"]}
    assert response["error"]["code"] == "server_error" and "ask again" in response["error"]["message"]
    if streams:
        events = await told(second, state)
        told_text(events)
        assert (events[-1]["type"], events[-1]["response"]) == ("response.failed", response)
    assert not second.dispatcher.requests


async def test_a_task_that_nobody_can_look_for_now_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = await left_behind(tmp_path)
    second, stat = router(tmp_path), os.stat

    def fails(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if "/tasks/" in str(path):
            raise OSError(errno.ESTALE, "Stale file handle")
        return stat(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", fails)
        assert (await shown(second, state))["status"] == "in_progress"
    async with runs(second).keeping():
        assert text_of(await ended(second, state)) == "Hello, world"


async def test_who_follows_one_whose_task_is_lost_meanwhile_gets_its_end(tmp_path: Path) -> None:
    state = await left_streaming(tmp_path)
    second = router(tmp_path)
    following = asyncio.create_task(told(second, state))
    await asyncio.sleep(0.05)
    assert not following.done()
    [task] = (tmp_path / "tasks").iterdir()
    task.unlink()
    events = await following
    assert (events[-1]["type"], events[-1]["response"]["status"]) == ("response.failed", "failed")
    assert events == await told(second, state)


async def test_one_that_is_computed_here_goes_on_whatever_becomes_of_its_task(tmp_path: Path) -> None:
    served = router(tmp_path, script=Script("Hello", hold_at=2))
    state = await begin(served)
    await served.dispatcher.held.wait()
    [task] = (tmp_path / "tasks").iterdir()
    task.unlink()
    assert (await shown(served, state))["status"] == "in_progress"
    served.dispatcher.go.set()
    assert text_of(await ended(served, state)) == "Hello"


@pytest.mark.parametrize("num_events", [0, 1, 2, 3])
async def test_events_keep_their_numbers_where_few_of_them_are_left(tmp_path: Path, num_events: int) -> None:
    state = await left_streaming(tmp_path)
    [path] = (tmp_path / "events").iterdir()
    events = path.read_bytes().split(b"\n\n")
    path.write_bytes(b"\n\n".join([*events[:num_events], events[num_events][:20]]))
    second = router(tmp_path)
    async with runs(second).keeping():
        assert (await ended(second, state))["status"] == "completed"
        found = await told(second, state)
    assert told_text(found) == "Hello, world" and found[-1]["type"] == "response.completed"
    assert [event["response"]["id"] for event in found[:2]] == [state["id"]] * 2


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_task_that_cannot_be_read_now_is_free_for_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = TaskFolder(tmp_path / "tasks")
    folder.create("a", Task("resp_a", b"t", b"{}", ())).release()
    before = open_files()

    def fails(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fails)
        assert folder.take_free((), 9) == []
    assert open_files() == before
    [held] = folder.take_free((), 9)
    held.release()


async def test_a_long_input_is_refused_for_good_and_without_background_it_is_answered(tmp_path: Path) -> None:
    served = router(tmp_path)
    items = [
        {"type": "reasoning", "id": "rs_x", "summary": [], "encrypted_content": "A" * 5_000_000},
        {"role": "user", "content": "hi"},
    ]
    for streams in (False, True):
        response = await call(served, "POST", json=BODY | {"input": items, "stream": streams})
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (413, "background", "request_too_large")
        assert "retry-after" not in response.headers
    assert not list((tmp_path / "tasks").iterdir()) and not list((tmp_path / "events").iterdir())
    assert len(served.app.api.in_flight) == 0
    assert (await call(served, "POST", json={"input": items})).status_code == 200
