"""Responses that nobody waits for: computed to their end, by whichever router is there, or cancelled."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvferry.router.access.keys import ApiKeys
from kvferry.router.access.quota import QuotaLimits
from kvferry.router.catalogue.version import ServedModel
from kvferry.router.responses import background, kept
from kvferry.router.responses import runs as background_runs
from kvferry.router.responses.conversation import Conversation
from kvferry.router.responses.task_folder import Task, TaskFolder
from kvferry.router.state.errors import StreamError

from ..fakes import MODEL, VOCAB_SIZE, Script, serve
from .backgrounds import (
    BODY,
    begin,
    call,
    ended,
    no_room,
    router,
    runs,
    shown,
    sweep_below_what_follows,
    text_of,
    until,
)


@pytest.fixture(autouse=True)
def looking_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(background_runs, "RETRY_S", 0.02)


async def test_it_is_computed_though_nobody_waits_and_any_router_shows_it(tmp_path: Path) -> None:
    first, second = router(tmp_path, script=Script("Hello, world", hold_at=3)), router(tmp_path)
    state = await begin(first)
    await first.dispatcher.held.wait()
    assert (await shown(second, state))["status"] == "in_progress"
    going_on = await call(second, "POST", json={"input": "more", "previous_response_id": state["id"]})
    assert (going_on.status_code, going_on.json()["error"]["code"]) == (400, "response_not_completed")
    first.dispatcher.go.set()
    response = await ended(second, state)
    assert (response["status"], response["background"], text_of(response)) == ("completed", True, "Hello, world")
    assert response["usage"]["output_tokens"] == len("Hello, world") + 1
    assert not list((tmp_path / "tasks").iterdir())
    again = await call(second, "POST", json={"input": "more", "previous_response_id": state["id"]})
    assert again.status_code == 200
    items = (await call(second, "GET", f"/{again.json()['id']}/input_items")).json()["data"]
    assert [item["content"][0]["text"] for item in reversed(items)] == ["hi", "Hello, world", "more"]


async def test_the_length_may_end_it(tmp_path: Path) -> None:
    served = router(tmp_path)
    response = await ended(served, await begin(served, max_output_tokens=3))
    assert (response["status"], text_of(response)) == ("incomplete", "Hel")


async def test_another_router_goes_on_where_one_ends(tmp_path: Path) -> None:
    first, second = router(tmp_path, script=Script("Hello, world", hold_at=4)), router(tmp_path)
    async with runs(first).keeping():
        state = await begin(first)
        await first.dispatcher.held.wait()
        for _ in range(20):
            await asyncio.sleep(0)
    assert first.dispatcher.aborted and (await shown(second, state))["status"] == "in_progress"
    async with runs(second).keeping():
        response = await ended(second, state)
    assert (response["status"], text_of(response)) == ("completed", "Hello, world")
    [began], [went_on] = first.dispatcher.requests, second.dispatcher.requests
    assert began.sampling.seed == went_on.sampling.seed
    assert began.request_id != went_on.request_id  # workers may still know the first one, and end the second for it
    assert not list((tmp_path / "tasks").iterdir())


async def test_what_goes_on_costs_no_second_request(tmp_path: Path) -> None:
    first = router(tmp_path, script=Script("Hello, world", hold_at=4))
    second = router(tmp_path, quota=QuotaLimits(None, 5, None))
    async with runs(first).keeping():
        state = await begin(first)
        await first.dispatcher.held.wait()
        for _ in range(20):
            await asyncio.sleep(0)
    async with runs(second).keeping():
        assert text_of(await ended(second, state)) == "Hello, world"
    response = await call(second, "POST", json={"input": "more"})
    assert response.headers["x-ratelimit-remaining-requests"] == "4"


async def test_it_goes_on_as_it_was_asked_to(tmp_path: Path) -> None:
    first, second = router(tmp_path, script=Script("Hello, world", hold_at=4)), router(tmp_path)
    async with runs(first).keeping():
        state = await begin(first, top_k=4, repetition_penalty=1.1, stop="wor", include_stop_str_in_output=True)
        await first.dispatcher.held.wait()
    async with runs(second).keeping():
        response = await ended(second, state)
    assert text_of(response) == "Hello, wor"
    sampling = second.request.sampling
    assert (sampling.top_k, sampling.repetition_penalty) == (4, 1.1)
    assert (state["temperature"], response["temperature"]) == (1.0, 1.0)


@pytest.mark.parametrize("code", ["shutting_down", "router_stopping"])
async def test_what_a_router_takes_while_it_ends_is_computed_by_another_one(tmp_path: Path, code: str) -> None:
    script = Script("Hello", fail_after=2, error=StreamError("the router stops", code, 503))
    first, second = router(tmp_path, script=script), router(tmp_path, "Hello")
    state = await begin(first)
    async with runs(first).keeping():
        pass
    late = await begin(first)
    async with runs(second).keeping():
        for each in (state, late):
            assert text_of(await ended(second, each)) == "Hello"


async def test_what_is_under_way_is_not_swept_away_by_answers_that_follow(tmp_path: Path) -> None:
    first, second = router(tmp_path, script=Script("Hello", hold_at=2)), router(tmp_path, "Hello")
    async with runs(first).keeping():
        state = await begin(first)
        await first.dispatcher.held.wait()
        await sweep_below_what_follows(tmp_path)
        assert await shown(second, state) == state
    await sweep_below_what_follows(tmp_path)  # while it waits for another router, too
    async with runs(second).keeping():
        assert text_of(await ended(second, state)) == "Hello"
    await sweep_below_what_follows(tmp_path)
    assert (await call(second, "GET", f"/{state['id']}")).status_code == 404  # it leaves as others do, now


async def test_a_router_without_workers_leaves_it_to_others(tmp_path: Path) -> None:
    first, second = router(tmp_path, script=Script("Hello", hold_at=0)), router(tmp_path, "Hello")
    async with runs(first).keeping():
        state = await begin(first)
    second.dispatcher.reasons = ["no decode worker is ready"]
    async with runs(second).keeping():
        await asyncio.sleep(0.1)
        assert not second.dispatcher.requests
        second.dispatcher.reasons = []
        assert (await ended(second, state))["status"] == "completed"


@pytest.mark.parametrize("elsewhere", [False, True], ids=["at its router", "at another router"])
async def test_it_is_cancelled(tmp_path: Path, elsewhere: bool) -> None:
    first = router(tmp_path, script=Script("Hello, world", hold_at=2))
    second = router(tmp_path) if elsewhere else first
    async with runs(first).keeping():
        state = await begin(first)
        await first.dispatcher.held.wait()
        for _ in range(2):  # twice is as once
            response = await call(second, "POST", f"/{state['id']}/cancel")
            assert (response.status_code, response.json()["status"]) == (200, "cancelled"), response.text
    await first.dispatcher.abort_seen.wait()
    assert await shown(first, state) == state | {"status": "cancelled"}
    assert not list((tmp_path / "tasks").iterdir())


async def test_one_whose_router_has_ended_is_cancelled_by_whoever_is_asked(tmp_path: Path) -> None:
    first, second = router(tmp_path, script=Script("Hello", hold_at=0)), router(tmp_path)
    async with runs(first).keeping():
        state = await begin(first)
    assert (await call(second, "POST", f"/{state['id']}/cancel")).json()["status"] == "cancelled"
    async with runs(second).keeping():
        await asyncio.sleep(0.1)
    assert not second.dispatcher.requests and not list((tmp_path / "tasks").iterdir())


async def test_what_is_deleted_ends(tmp_path: Path) -> None:
    served = router(tmp_path, script=Script("Hello", hold_at=2))
    state = await begin(served)
    await served.dispatcher.held.wait()
    assert (await call(served, "DELETE", f"/{state['id']}")).json()["deleted"]
    assert served.dispatcher.aborted and not list((tmp_path / "tasks").iterdir())
    assert (await call(served, "GET", f"/{state['id']}")).status_code == 404


async def test_what_ends_without_a_router_that_ends_it_is_told_to_be_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "CANCEL_WITHIN_S", 0.05)
    first, second = router(tmp_path, script=Script("Hello", hold_at=0)), router(tmp_path)
    state = await begin(first)  # which looks for nothing
    response = await call(second, "POST", f"/{state['id']}/cancel")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "cancellation_pending")
    async with runs(first).keeping():
        assert (await ended(second, state))["status"] == "cancelled"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (Script("Hello, world", fail_after=3), "server_error"),
        (Script("Hello", fails_queued=True, error=StreamError("poison", "poison", 400)), "invalid_prompt"),
    ],
)
async def test_an_error_is_its_end(tmp_path: Path, script: Script, code: str) -> None:
    served = router(tmp_path, script=script)
    response = await ended(served, await begin(served))
    assert (response["status"], response["error"]["code"]) == ("failed", code)
    assert str(script.error) in response["error"]["message"]
    assert not list((tmp_path / "tasks").iterdir())


async def test_an_error_where_it_goes_on_is_its_end_too(tmp_path: Path) -> None:
    first = router(tmp_path, script=Script("Hello", hold_at=0))
    second = router(tmp_path, script=Script("Hello", refuse=StreamError("worker d-1 was lost", "worker_lost", 503)))
    async with runs(first).keeping():
        state = await begin(first)
    async with runs(second).keeping():
        response = await ended(second, state)
    assert (response["status"], response["error"]["message"]) == ("failed", "worker d-1 was lost")


@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        ({"background": "yes"}, {}, "background"),
        ({"store": False}, {}, "background"),
        ({"stream": "yes"}, {}, "stream"),
        ({"input": []}, {}, "input"),
        ({"temperature": -1}, {}, "temperature"),
        ({}, {"idempotency-key": "k"}, "Idempotency-Key"),
    ],
)
async def test_what_does_not_go_is_refused_at_once(
    tmp_path: Path, body: dict[str, Any], headers: dict[str, str], param: str
) -> None:
    served = router(tmp_path)
    response = await call(served, "POST", json=BODY | body, headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert not served.dispatcher.requests and not list((tmp_path / "tasks").iterdir())


async def test_a_router_without_a_folder_refuses_it() -> None:
    response = await call(serve(Script("Hello")), "POST", json=BODY)
    assert response.status_code == 400 and "--answers-dir" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "background"


async def test_what_it_answers_is_listed_whatever_becomes_of_it(tmp_path: Path) -> None:
    served = router(tmp_path, script=Script("x" * 40, hold_at=1))

    async def listed(state: dict[str, Any]) -> list[str]:
        response = await call(served, "GET", f"/{state['id']}/input_items")
        assert response.status_code == 200, response.text
        return [item["content"][0]["text"] for item in response.json()["data"]]

    async with runs(served).keeping():
        state = await begin(served)
        await served.dispatcher.held.wait()
        assert await listed(state) == ["hi"]
        assert (await call(served, "POST", f"/{state['id']}/cancel")).json()["status"] == "cancelled"
        assert await listed(state) == ["hi"]


async def test_others_find_nothing_and_what_was_waited_for_is_not_cancelled(tmp_path: Path) -> None:
    served = router(tmp_path, keys=ApiKeys(("key-1", "key-2")))
    mine, others = {"authorization": "Bearer key-1"}, {"authorization": "Bearer key-2"}
    said = (await call(served, "POST", json={"input": "hi"}, headers=mine)).json()
    for response_id, headers, status in ((said["id"], mine, 400), (said["id"], others, 404), ("resp_x", mine, 404)):
        response = await call(served, "POST", f"/{response_id}/cancel", headers=headers)
        assert response.status_code == status, response.text


async def test_a_quota_is_held_until_it_has_ended(tmp_path: Path) -> None:
    limits = QuotaLimits(max_concurrency=1)
    served = router(tmp_path, script=Script("Hello", hold_at=2), keys=ApiKeys(("key-1",)), quota=limits)
    key = {"authorization": "Bearer key-1"}
    state = (await call(served, "POST", json=BODY, headers=key)).json()
    await served.dispatcher.held.wait()
    assert (await call(served, "POST", json=BODY, headers=key)).status_code == 429
    served.dispatcher.go.set()

    async def has_ended() -> bool:
        return bool((await call(served, "GET", f"/{state['id']}", headers=key)).json()["status"] == "completed")

    await until(has_ended)
    assert (await call(served, "POST", json={"input": "hi"}, headers=key)).status_code == 200


async def test_a_full_disk_refuses_it_and_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = router(tmp_path, script=Script("Hello", hold_at=3))

    monkeypatch.setattr(Path, "replace", no_room)
    response = await call(served, "POST", json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_kept")
    await served.dispatcher.abort_seen.wait()
    assert len(served.app.api.in_flight) == 0 and not list((tmp_path / "tasks").iterdir())


async def test_an_answer_that_is_too_long_to_be_kept_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = router(tmp_path, script=Script("Hello, world", hold_at=3))
    state = await begin(served)
    monkeypatch.setattr(kept, "MAX_BYTES_OF_ONE", 100)
    served.dispatcher.go.set()
    response = await ended(served, state)
    assert (response["status"], response["error"]["message"]) == ("failed", "the answer is too long to be kept")


async def test_a_state_that_is_too_long_to_be_kept_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = router(tmp_path, script=Script("Hello", hold_at=3))
    monkeypatch.setattr(kept, "MAX_BYTES_OF_ONE", 100)
    response = await call(served, "POST", json=BODY)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (413, "request_too_large")
    assert error["param"] == "background" and "more than 100 bytes" in error["message"]
    assert response.headers["x-should-retry"] == "false"
    await served.dispatcher.abort_seen.wait()
    assert not list((tmp_path / "responses").iterdir()) and not list((tmp_path / "tasks").iterdir())


async def test_what_the_disk_has_no_room_for_is_told_when_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = router(tmp_path, script=Script("Hello", hold_at=3))
    state = await begin(served)
    await served.dispatcher.held.wait()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", no_room)
        served.dispatcher.go.set()
        for _ in range(100):
            await asyncio.sleep(0)
        assert (await shown(served, state))["status"] == "in_progress"
    async with runs(served).keeping():
        assert text_of(await ended(served, state)) == "Hello"
    assert len(served.dispatcher.requests) == 1 and not list((tmp_path / "tasks").iterdir())


async def test_a_cancellation_that_the_disk_has_no_room_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "CANCEL_WITHIN_S", 0.05)
    served = router(tmp_path, script=Script("Hello", hold_at=3))
    state = await begin(served)
    await served.dispatcher.held.wait()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", no_room)
        response = await call(served, "POST", f"/{state['id']}/cancel")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "cancellation_pending")
    assert served.dispatcher.aborted
    assert (await call(served, "POST", f"/{state['id']}/cancel")).json()["status"] == "cancelled"


async def test_one_whose_file_is_lost_is_cancelled_by_whoever_is_asked(tmp_path: Path) -> None:
    first, second = router(tmp_path, script=Script("Hello", hold_at=0)), router(tmp_path)
    state = await begin(first)
    [path] = (tmp_path / "tasks").iterdir()
    path.unlink()
    assert (await call(second, "POST", f"/{state['id']}/cancel")).json()["status"] == "cancelled"


async def test_so_many_are_computed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_runs, "_FILES_SHARE", 1 << 40)
    first, second = (router(tmp_path, script=Script("Hello", hold_at=2)) for _ in range(2))
    state = await begin(first)
    refused = await call(first, "POST", json=BODY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_kept")
    assert "1 are computed at once" in refused.json()["error"]["message"]
    other = await begin(second)
    async with runs(second).keeping():
        pass
    async with runs(first).keeping():
        await asyncio.sleep(0.1)
        assert (await shown(first, other))["status"] == "in_progress"
        first.dispatcher.go.set()
        first.script.hold_at = None
        assert [(await ended(first, each))["status"] for each in (state, other)] == ["completed"] * 2


@pytest.mark.parametrize("has_ended", [False, True], ids=["it is not kept", "it has ended"])
async def test_what_needs_no_more_computing_is_not_computed(tmp_path: Path, has_ended: bool) -> None:
    first, second = router(tmp_path, script=Script("Hello", hold_at=0)), router(tmp_path)
    async with runs(first).keeping():
        state = await begin(first)
    [kept_file] = (tmp_path / "responses").iterdir()
    if has_ended:
        found = Conversation.parted(memoryview(kept_file.read_bytes()))
        assert found is not None
        said = bytes(found.response).replace(b'"in_progress"', b'"completed"')
        kept_file.write_bytes(replace(found, response=said).joined())
    else:
        kept_file.unlink()
    async with runs(second).keeping():

        async def is_gone() -> bool:
            return not list((tmp_path / "tasks").iterdir())

        await until(is_gone)
    assert not second.dispatcher.requests
    assert (await call(second, "GET", f"/{state['id']}")).status_code == (200 if has_ended else 404)


async def test_who_serves_another_model_leaves_it_alone(tmp_path: Path) -> None:
    first = router(tmp_path, script=Script("Hello", hold_at=0))
    other = router(tmp_path, model=ServedModel("other", 4096, VOCAB_SIZE))
    async with runs(first).keeping():
        state = await begin(first, model=MODEL)
    async with runs(other).keeping():
        await asyncio.sleep(0.1)
    assert not other.dispatcher.requests and (await shown(other, state))["status"] == "in_progress"
    first.script.hold_at = None
    async with runs(router(tmp_path, "Hello")).keeping():
        assert text_of(await ended(first, state)) == "Hello"


def test_a_task_that_is_not_whole_is_deleted_and_one_that_is_held_is_not_taken(tmp_path: Path) -> None:
    folder = TaskFolder(tmp_path / "tasks")
    held = folder.create("a", Task("resp_a", b"t", b"{}", ((b"x", b"y"),)))
    (tmp_path / "tasks" / "b").write_bytes(b"no task")
    other = TaskFolder(tmp_path / "tasks")
    assert other.take("a") is None and other.take_free((), 9) == [] and not (tmp_path / "tasks" / "b").exists()
    held.release()
    assert other.take_free({"a"}, 9) == [] and other.take_free((), 0) == []
    [taken] = other.take_free((), 9)
    assert taken.task == held.task
    other.ask_to_cancel("a")
    assert folder.cancelled() == {"a"}
    other.end(taken)
    assert not list((tmp_path / "tasks").iterdir()) and folder.take("a") is None
    other.ask_to_cancel("a")  # too late
    assert folder.cancelled() == set() and not list((tmp_path / "tasks").iterdir())


async def test_its_answer_is_what_a_client_that_waits_gets(tmp_path: Path) -> None:
    waited = (await call(router(tmp_path / "a"), "POST", json={**BODY, "background": False})).json()
    served = router(tmp_path / "b")
    response = await ended(served, await begin(served))
    same = {"id", "created_at", "completed_at", "background", "output"}
    assert {k: v for k, v in response.items() if k not in same} == {k: v for k, v in waited.items() if k not in same}
    assert json.dumps(response["output"]).replace(response["id"][5:], "") == json.dumps(waited["output"]).replace(
        waited["id"][5:], ""
    )
