"""Background responses that stream: whoever follows them gets each event once, from any router, whatever ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.router.access.keys import ApiKeys
from kvferry.router.catalogue.version import ServedModel
from kvferry.router.http.http_server import HttpServer
from kvferry.router.responses import background, event_files, event_stream
from kvferry.router.responses.event_files import EventFolder
from kvferry.router.state.errors import StreamError

from ..fakes import MODEL, VOCAB_SIZE, Script, Served
from .backgrounds import BODY, PATH, call, no_room, router, runs, shown, sweep_below_what_follows, until

STREAM = BODY | {"stream": True}
Event = dict[str, Any]


@pytest.fixture(autouse=True)
def looking_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(background, "_GROWS_WITHIN_S", 0.001)


def read(text: str) -> list[Event]:
    """Return the events of a stream, whose lines agree."""
    found = []
    for event in text.split("\n\n")[:-1]:
        *numbers, kind, data = event.split("\n")
        read = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {read['type']}"
        assert all(number == f"id: {read['sequence_number'] + 1}" for number in numbers)
        found.append(read)
    return found


def check_whole(events: list[Event], text: str) -> None:
    """Check the events of a whole answer, from the first on."""
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(event["delta"] for event in events if "delta" in event) == text
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == text


def events_in(folder: Path) -> str:
    [path] = (folder / "events").iterdir()
    return path.read_text()


async def begin(served: Served, folder: Path, **body: Any) -> asyncio.Task[httpx.Response]:
    """Have somebody follow a response from its beginning on; it is there when this returns."""
    following = asyncio.create_task(call(served, "POST", json=STREAM | body))

    async def is_there() -> bool:
        return following.done() or bool([*(folder / "events").iterdir()])

    await until(is_there)
    return following


async def follow(served: Served, response_id: str, after: int | None = None, **options: Any) -> httpx.Response:
    asked = "" if after is None else f"&starting_after={after}"
    return await call(served, "GET", f"/{response_id}?stream=true{asked}", **options)


async def followed(served: Served, response_id: str, after: int | None = None) -> list[Event]:
    response = await follow(served, response_id, after)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return read(response.text)


async def test_its_events_come_as_those_of_any_stream_and_its_name_at_once(tmp_path: Path) -> None:
    plain = await call(router(tmp_path / "plain"), "POST", json={**STREAM, "background": False})
    served = router(tmp_path, script=Script("Hello, world", hold_at=0))
    following = await begin(served, tmp_path)
    [created, in_progress] = read(events_in(tmp_path))  # before a token
    assert (created["type"], in_progress["type"]) == ("response.created", "response.in_progress")
    assert created["response"] == await shown(served, created["response"])
    served.dispatcher.go.set()
    events = read((await following).text)
    check_whole(events, "Hello, world")
    assert [event["type"] for event in events] == [event["type"] for event in read(plain.text)]
    assert events[-1]["response"] == await shown(served, created["response"])
    assert not list((tmp_path / "tasks").iterdir())


async def test_its_first_events_are_there_however_long_it_waits(tmp_path: Path) -> None:
    served = router(tmp_path, script=Script("Hello, world", hold_at=0))
    following = await begin(served, tmp_path)
    name = read(events_in(tmp_path))[0]["response"]["id"]
    await served.dispatcher.held.wait()
    await sweep_below_what_follows(tmp_path)
    other = asyncio.create_task(followed(served, name))
    served.dispatcher.go.set()
    events = read((await following).text)
    check_whole(events, "Hello, world")
    assert await other == events == await followed(served, name)


async def test_many_follow_at_any_router_from_wherever_they_are(tmp_path: Path) -> None:
    first, second = router(tmp_path, script=Script("Hello, world", hold_at=5)), router(tmp_path)
    begun = await begin(first, tmp_path)
    await first.dispatcher.held.wait()
    name = read(events_in(tmp_path))[0]["response"]["id"]
    afters = (None, 0, 3, 7, 500)
    others = [asyncio.create_task(follow(each, name, after)) for each in (first, second) for after in afters]
    await asyncio.sleep(0.02)
    first.dispatcher.go.set()
    events = read((await begun).text)
    check_whole(events, "Hello, world")
    for number, response in enumerate([await other for other in others] + [await follow(second, name, 3)]):
        after = 3 if number == len(others) else afters[number % len(afters)]
        assert read(response.text) == events[0 if after is None else after + 1 :]


async def test_another_router_goes_on_behind_the_last_event(tmp_path: Path) -> None:
    first, second = router(tmp_path, script=Script("Hello, world", hold_at=4)), router(tmp_path)
    async with runs(first).keeping():
        begun = await begin(first, tmp_path)
        await first.dispatcher.held.wait()
        name = read(events_in(tmp_path))[0]["response"]["id"]
        following = asyncio.create_task(follow(second, name))
        await asyncio.sleep(0.02)
    assert not begun.done() and not following.done()  # no end is told, and no error
    told = len(read(events_in(tmp_path)))
    assert told > 4
    async with runs(second).keeping():
        for response in (await following, await begun):
            check_whole(read(response.text), "Hello, world")
    [began], [went_on] = first.dispatcher.requests, second.dispatcher.requests
    assert began.sampling.seed == went_on.sampling.seed


async def test_another_router_begins_where_nothing_was_told_but_its_name(tmp_path: Path) -> None:
    first, second = router(tmp_path, script=Script("Hello", hold_at=0)), router(tmp_path, "Hello")
    async with runs(first).keeping():
        begun = await begin(first, tmp_path)
    async with runs(second).keeping():
        check_whole(read((await begun).text), "Hello")


async def test_what_a_death_left_untold_of_a_whole_answer_is_told(tmp_path: Path) -> None:
    """The answer is kept before its last events are."""
    first = router(tmp_path, script=Script("Hello, world", hold_at=5))
    begun = await begin(first, tmp_path)
    await first.dispatcher.held.wait()
    [task] = (tmp_path / "tasks").iterdir()
    undone = task.read_bytes()
    first.dispatcher.go.set()
    events = read((await begun).text)
    [path] = (tmp_path / "events").iterdir()
    whole = path.read_bytes()
    for num_bytes in (len(whole) - 1, len(whole) - 700, len(whole) // 2):
        path.write_bytes(whole[:num_bytes])
        task.write_bytes(undone)
        name, second = events[0]["response"]["id"], router(tmp_path)
        async with runs(second).keeping():
            again = await followed(second, name)
        check_whole(again, "Hello, world")
        assert again[:-1] == events[:-1]
        assert (await shown(second, events[0]["response"]))["status"] == "completed"
        assert not list((tmp_path / "tasks").iterdir())
        assert not second.dispatcher.requests  # nothing of it is computed again


async def test_an_answer_whose_beginning_is_lost_has_failed(tmp_path: Path) -> None:
    first, second = router(tmp_path, script=Script("Hello, world", hold_at=4)), router(tmp_path)
    async with runs(first).keeping():
        begun = await begin(first, tmp_path)
        await first.dispatcher.held.wait()
    [answer] = (name for name in os.listdir(tmp_path) if name.endswith(".own"))
    os.unlink(tmp_path / answer)
    async with runs(second).keeping():
        events = read((await begun).text)
    assert events[-1]["type"] == "response.failed" and events[-1]["sequence_number"] == len(events) - 1
    assert events[-1]["response"] == await shown(second, events[0]["response"])
    error = events[-1]["response"]["error"]
    assert error["code"] == "server_error" and "the beginning of the answer" in error["message"]


async def test_who_cannot_say_what_was_told_leaves_it_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = router(tmp_path, script=Script("Hello, world", hold_at=4)), router(tmp_path)
    third = router(tmp_path)
    async with runs(first).keeping():
        begun = await begin(first, tmp_path)
        await first.dispatcher.held.wait()
    monkeypatch.setattr(second.app.api.kept_answers, "_max_held", 0)
    async with runs(second).keeping():
        await asyncio.sleep(0.1)
        assert not begun.done()
    async with runs(third).keeping():
        check_whole(read((await begun).text), "Hello, world")


async def test_a_router_that_ends_tells_its_followers_behind_what_they_come_back(tmp_path: Path) -> None:
    first, second = router(tmp_path, script=Script("Hello, world", hold_at=4)), router(tmp_path)
    begun = await begin(first, tmp_path)
    await first.dispatcher.held.wait()
    name = read(events_in(tmp_path))[0]["response"]["id"]
    following = asyncio.create_task(follow(second, name))
    await asyncio.sleep(0.02)
    assert len(second.app.api.in_flight) == 1  # who drains waits for it
    second.app.api.in_flight.end_all()
    *events, error = read((await following).text)
    assert (error["type"], error["code"], error["sequence_number"]) == ("error", "shutting_down", len(events) - 1)
    first.dispatcher.go.set()
    check_whole(events + await followed(first, name, error["sequence_number"]), "Hello, world")
    check_whole(read((await begun).text), "Hello, world")
    assert len(first.app.api.in_flight) == len(second.app.api.in_flight) == 0


async def test_a_router_that_leaves_waits_for_nobody_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "_QUIET_S", 0.05)
    first, second = router(tmp_path, script=Script("Hello, world", hold_at=4)), router(tmp_path)
    async with runs(first).keeping():
        begun = await begin(first, tmp_path)
        await first.dispatcher.held.wait()
        await asyncio.sleep(0.1)  # quiet, though nobody leaves
        assert not begun.done()
    first.app.api.in_flight.is_leaving = True
    *events, error = read((await begun).text)
    assert (error["type"], error["code"], error["sequence_number"]) == ("error", "shutting_down", len(events) - 1)
    async with runs(second).keeping():
        name = events[0]["response"]["id"]
        check_whole(events + await followed(second, name, error["sequence_number"]), "Hello, world")


async def test_a_router_that_leaves_tells_what_another_one_computes(tmp_path: Path) -> None:
    first, second = router(tmp_path, script=Script("Hello, world", hold_at=4)), router(tmp_path)
    async with runs(first).keeping():
        begun = await begin(first, tmp_path)
        await first.dispatcher.held.wait()
    first.app.api.in_flight.is_leaving = True
    async with runs(second).keeping():
        check_whole(read((await begun).text), "Hello, world")


@contextlib.asynccontextmanager
async def listening(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        async with HttpServer(served.app).serving(sock), httpx.AsyncClient(base_url=url) as client:
            yield client


async def test_a_client_that_leaves_does_not_end_it_and_comes_back(tmp_path: Path) -> None:
    served = router(tmp_path, script=Script("Hello, world", hold_at=4))
    had = ""
    async with listening(served) as client:
        async with client.stream("POST", PATH, json=STREAM) as response:
            async for text in response.aiter_text():
                had += text
                if served.dispatcher.held.is_set() and len(read(had)) > 5:
                    break
        api = served.app.api

        async def has_left() -> bool:
            return len(api.in_flight) == 1  # its run

        await until(has_left)
        assert not served.dispatcher.aborted
        served.dispatcher.go.set()
        events = read(had)
        name, after = events[0]["response"]["id"], events[-1]["sequence_number"]
        rest = await client.get(f"{PATH}/{name}", params={"stream": "true", "starting_after": after})
    check_whole(events + read(rest.text), "Hello, world")


async def test_one_that_is_cancelled_ends_without_an_answer(tmp_path: Path) -> None:
    served = router(tmp_path, script=Script("Hello, world", hold_at=4))
    begun = await begin(served, tmp_path)
    await served.dispatcher.held.wait()
    created = read(events_in(tmp_path))[0]["response"]
    assert (await call(served, "POST", f"/{created['id']}/cancel")).json()["status"] == "cancelled"
    events = read((await begun).text)
    assert events[-1]["type"] == "response.output_text.delta"
    assert await followed(served, created["id"]) == events


async def test_what_fails_ends_with_its_error(tmp_path: Path) -> None:
    served = router(tmp_path, script=Script("Hello, world", fail_after=3))
    events = read((await call(served, "POST", json=STREAM)).text)
    assert events[-1]["type"] == "response.failed" and events[-1]["sequence_number"] == len(events) - 1
    response = events[-1]["response"]
    assert (response["status"], response["error"]["message"]) == ("failed", "worker d-1 was lost")
    assert response == await shown(served, events[0]["response"])


async def test_what_fails_before_a_token_ends_with_its_error(tmp_path: Path) -> None:
    script = Script("Hello", fails_queued=True, error=StreamError("poison", "poison", 400))
    events = read((await call(router(tmp_path, script=script), "POST", json=STREAM)).text)
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert events[-1]["response"]["error"] == {"code": "invalid_prompt", "message": "poison"}


async def test_events_that_cannot_be_kept_are_told_to_nobody_and_the_answer_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = router(tmp_path, script=Script("Hello, world", hold_at=4))
    begun = await begin(served, tmp_path)
    await served.dispatcher.held.wait()
    monkeypatch.setattr(event_files, "MAX_BYTES_OF_ONE", 0)
    served.dispatcher.go.set()
    events = read((await begun).text)
    assert events[-1]["type"] == "response.output_text.delta" and not list((tmp_path / "events").iterdir())
    response = await shown(served, events[0]["response"])
    assert (response["status"], response["output"][0]["content"][0]["text"]) == ("completed", "Hello, world")
    again = await follow(served, response["id"])
    assert (again.status_code, again.json()["error"]["param"]) == (400, "stream")


async def test_an_answer_goes_on_where_its_events_can_be_neither_kept_nor_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk was mounted anew, for reading only."""
    file = EventFolder(tmp_path / "events").create("name", b"event: a\ndata: {}\n\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", no_room)
        patch.setattr(os, "unlink", no_room)
        file.add(b"event: b\ndata: {}\n\n")
    assert not file.is_kept
    file.close()


async def test_a_full_disk_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = router(tmp_path, script=Script("Hello", hold_at=3))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", no_room)
        response = await call(served, "POST", json=STREAM)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_kept")

    def short(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", short)
    response = await call(served, "POST", json=STREAM)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_kept")
    assert not list((tmp_path / "events").iterdir()) and not list((tmp_path / "tasks").iterdir())


async def test_what_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    served = router(tmp_path, keys=ApiKeys(("key-1", "key-2")))
    mine, others = {"authorization": "Bearer key-1"}, {"authorization": "Bearer key-2"}
    name = read((await call(served, "POST", json=STREAM, headers=mine)).text)[0]["response"]["id"]
    waited_for = (await call(served, "POST", json={"input": "hi"}, headers=mine)).json()["id"]
    for response_id, headers, asked, status, param in (
        (name, others, "stream=true", 404, "response_id"),
        ("resp_x", mine, "stream=true", 404, "response_id"),
        (waited_for, mine, "stream=true", 400, "stream"),
        (name, mine, "stream=1", 400, "stream"),
        (name, mine, "stream=true&starting_after=-1", 400, "starting_after"),
        (name, mine, "starting_after=x", 400, "starting_after"),
    ):
        response = await call(served, "GET", f"/{response_id}?{asked}", headers=headers)
        assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    whole = await call(served, "GET", f"/{name}?starting_after=3", headers=mine)
    assert whole.json()["status"] == "completed"
    assert (await call(served, "DELETE", f"/{name}", headers=mine)).status_code == 200
    assert not list((tmp_path / "events").iterdir())


async def test_an_event_may_be_long(tmp_path: Path) -> None:
    long = "x" * 200_000
    served = router(tmp_path, model=ServedModel(MODEL, 300_000, VOCAB_SIZE))
    events = read((await call(served, "POST", json=STREAM | {"instructions": long})).text)
    check_whole(events, "Hello, world")
    assert events[0]["response"]["instructions"] == long


@given(
    sizes=st.lists(st.integers(1, 40), max_size=12),
    cuts=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    after=st.integers(-1, 14),
    torn=st.integers(0, 30),
)
def test_whole_events_are_read_once_however_they_are_written(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], cuts: list[int], after: int, torn: int
) -> None:
    folder = EventFolder(tmp_path_factory.mktemp("events"))
    events = [b"%d %b\n\n" % (number, b"x" * size) for number, size in enumerate(sizes)]
    [path] = [folder._path / "a"]
    path.touch()
    reader, read = folder.reader("a", after), b""
    assert reader is not None
    reader._num_bytes = 16
    data = b"".join(events)
    for cut in [*cuts, len(data)]:
        with path.open("ab") as file:
            file.write(data[:cut])
        data = data[cut:]
        read += reader.read()
    while more := reader.read():
        read += more
    assert read == b"".join(events[after + 1 :]) and reader.last == max(after, len(events) - 1)
    with path.open("ab") as file:
        file.write(b"event: torn"[:torn])
    assert not reader.read()
    reader.close()
    written = folder.go_on("a")
    assert written is not None and written.num_events == len(events) and not written.has_last
    assert path.stat().st_size == len(b"".join(events))
    written.close()


def test_no_file_is_no_stream(tmp_path: Path) -> None:
    folder = EventFolder(tmp_path / "events")
    assert folder.reader("a", -1) is None and folder.go_on("a") is None
    folder.delete("a")
    assert os.listdir(tmp_path / "events") == []
