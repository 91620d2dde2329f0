"""A client that comes back with its Idempotency-Key misses nothing and gets nothing twice, wherever it was cut off.

The file of an answer is cut after each of its records, as a router's death leaves it; then the request comes again.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvferry.router.access.quota import QuotaLimits
from kvferry.router.catalogue.version import ServedModel
from kvferry.router.kept.answer_log import has_told
from kvferry.router.kept.answers import KeptAnswers
from kvferry.router.kept.kept_answer import AnswerKey

from ..fakes import MODEL, VOCAB_SIZE, Script, Served, serve

CHAT = [{"role": "user", "content": "hi"}]
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
CALL = '<tool_call>{"name": "f", "arguments": {"a": "bc"}}</tool_call>'
CALLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "text": ("/v1/completions", {"prompt": "ab", "max_tokens": 40}, "Hey wö"),
    "choices": ("/v1/completions", {"prompt": ["ab", "cd"], "n": 2, "best_of": 2, "max_tokens": 40}, "Hey"),
    "logprobs": ("/v1/completions", {"prompt": "ab", "logprobs": 2, "max_tokens": 40, "echo": False}, "Hey"),
    "stop": ("/v1/completions", {"prompt": "ab", "stop": ["y w"], "max_tokens": 40}, "Hey wo"),
    "usage": (
        "/v1/completions",
        {"prompt": "ab", "max_tokens": 40, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        "Hello",
    ),
    "chat": ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 40}, "Hey"),
    "tools": (
        "/v1/chat/completions",
        {"messages": CHAT, "max_tokens": 99, "tools": [{"type": "function", "function": FUNCTION}]},
        f"Ok {CALL}",
    ),
    "responses": ("/v1/responses", {"input": "hi", "max_output_tokens": 40}, "Hey"),
    "messages": ("/v1/messages", {"messages": CHAT, "max_tokens": 40}, "Hey"),
}
KEY = {"idempotency-key": "k"}


def served(folder: Path, text: str = "Hello, world", *, script: Script | None = None, **options: Any) -> Served:
    """A router of the folder: another one each time."""
    model = ServedModel(MODEL, 2048, VOCAB_SIZE, tool_parser="hermes", chooses_tools=True)
    return serve(script or Script(text), model=model, kept_answers=KeptAnswers(folder), **options)


async def ask(router: Served, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    async with router.client() as client:
        return await client.post(path, json=body, headers=KEY | headers)


def told(response: httpx.Response) -> list[tuple[int, str]]:
    """The numbered events."""
    assert response.status_code == 200, response.text
    found = [re.fullmatch(r"id: (\d+)\n(.*)", event, re.DOTALL) for event in response.text.split("\n\n")]
    return [(int(match[1]), match[2]) for match in found if match is not None]


def record_ends(data: bytes) -> list[int]:
    ends = [0]
    while ends[-1] < len(data):
        ends.append(ends[-1] + 8 + int.from_bytes(data[ends[-1] : ends[-1] + 4], "little"))
    return ends


def file_in(folder: Path) -> Path:
    [path] = [path for path in folder.iterdir() if path.is_file()]
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", CALLS)
async def test_an_answer_goes_on_from_wherever_its_router_died(tmp_path: Path, name: str) -> None:
    path, body, text = CALLS[name]
    body = body | {"stream": True}
    whole = told(await ask(served(tmp_path / "whole", text), path, body))
    assert [number for number, _ in whole] == list(range(1, len(whole) + 1)) and len(whole) > 2
    data = file_in(tmp_path / "whole").read_bytes()
    name_of_file = file_in(tmp_path / "whole").name
    numbers = set[int]()
    ends = record_ends(data)[1:]
    for place, end in [*list(enumerate(ends))[:: 1 + len(ends) // 16], (len(ends) - 1, ends[-1])]:
        folder = tmp_path / f"cut-{place}"

        def cut(folder: Path = folder, end: int = end) -> None:
            (folder / name_of_file).write_bytes(data[:end] + b"\7\0\0")  # and the beginning of another record

        stuck = served(folder, script=Script(text, fail_after=0))
        cut()
        before = told(await ask(stuck, path, body)) if place else []  # what the dead router may have told
        assert _comparable(before) == _comparable(whole[: len(before)])
        numbers.add(len(before))
        for after in {len(before) // 2, len(before)}:
            cut()
            response = await ask(served(folder, text), path, body, **{"last-event-id": str(after)})
            assert (response.headers.get("idempotent-replayed") == "true") == (place > 0)
            assert _comparable(told(response)) == _comparable(whole[after:])
    assert {0, len(whole)} <= numbers


def _comparable(events: list[tuple[int, str]]) -> list[tuple[int, str]]:
    return [(number, re.sub(r'"completed_at":[0-9.]+', "", event)) for number, event in events]


async def test_a_whole_answer_is_told_again_without_the_model(tmp_path: Path) -> None:
    first = served(tmp_path, script=Script("Hello", num_cached_tokens=0))
    body = {"prompt": "ab", "max_tokens": 9}
    told_first = (await ask(first, "/v1/completions", body)).json()
    second = served(tmp_path, "another text")
    again = await ask(second, "/v1/completions", body)
    assert again.json() == told_first and again.headers["idempotent-replayed"] == "true"
    assert second.dispatcher.requests == []


async def test_an_answer_that_was_begun_with_more_room_is_told_again(tmp_path: Path) -> None:
    body = {"prompt": "ab", "max_tokens": 100, "min_tokens": 60}
    script = Script("y" * 200, ends_with_eos=False)
    first = await ask(served(tmp_path, script=script), "/v1/completions", body)
    assert first.status_code == 200, first.text
    router = served(tmp_path, script=script)
    router.dispatcher.room = 60  # of a prompt and its answer
    again = await ask(router, "/v1/completions", body)
    assert (again.status_code, again.json()) == (200, first.json())
    other = await ask(router, "/v1/completions", body, **{"idempotency-key": "another"})
    assert other.status_code == 400 and other.json()["error"]["param"] == "min_tokens"


async def test_what_is_deleted_is_not_told_again(tmp_path: Path) -> None:
    path, body, _ = CALLS["responses"]
    first = (await ask(served(tmp_path), path, body)).json()
    assert (await ask(served(tmp_path), path, body)).json()["id"] == first["id"]
    router = served(tmp_path)
    async with router.client() as client:
        assert (await client.delete(f"{path}/{first['id']}")).status_code == 200
    again = await ask(router, path, body)
    assert again.json()["id"] != first["id"] and "idempotent-replayed" not in again.headers
    async with router.client() as client:
        assert (await client.get(f"{path}/{first['id']}")).status_code == 404


async def test_an_answer_that_is_forgotten_while_it_is_told_leaves_another_ones_place(tmp_path: Path) -> None:
    answers = KeptAnswers(tmp_path)
    told = await answers.take(AnswerKey("a" * 40, b"asked"), "model")
    answers.forget("a" * 40)
    begun = await answers.take(AnswerKey("a" * 40, b"asked"), "model")
    told.close()
    assert len(answers) == 1
    begun.close()
    assert len(answers) == 0


async def test_a_client_that_leaves_costs_nothing_until_it_comes_back(tmp_path: Path) -> None:
    router = served(tmp_path, script=Script("Hello, world", hold_at=5))
    body = {"prompt": "ab", "max_tokens": 40, "stream": True}
    asking = asyncio.create_task(ask(router, "/v1/completions", body))
    await router.dispatcher.held.wait()
    for _ in range(20):
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait([asking])
    await router.dispatcher.abort_seen.wait()
    router.script.hold_at = None
    events = told(await ask(router, "/v1/completions", body, **{"last-event-id": "3"}))
    assert events[0][0] == 4
    assert "".join(json.loads(event[6:])["choices"][0]["text"] for _, event in events) == "lo, world"
    first, second = router.dispatcher.requests
    assert first.sampling.seed == second.sampling.seed


async def test_who_comes_back_ends_the_older_connection(tmp_path: Path) -> None:
    first, second = served(tmp_path, script=Script("Hello, world", hold_at=5)), served(tmp_path)
    body = {"prompt": "ab", "max_tokens": 40, "stream": True}
    older = asyncio.create_task(ask(first, "/v1/completions", body))
    await first.dispatcher.held.wait()
    newer = told(await ask(second, "/v1/completions", body, **{"last-event-id": "2"}))
    assert [number for number, _ in newer][:2] == [3, 4]
    response = await older
    assert response.text.endswith("\n\n") and '"code":"taken_over"' in response.text and "[DONE]" not in response.text
    assert len(told(response)) == 5


async def test_what_was_paid_for_is_not_charged_again(tmp_path: Path) -> None:
    def left(response: httpx.Response) -> int:
        return int(response.headers["x-ratelimit-remaining-tokens"])

    limits = QuotaLimits(None, None, 1000)
    router = served(tmp_path, "Hello", quota=limits)
    body = {"prompt": "abcd", "max_tokens": 9}
    await ask(router, "/v1/completions", body)
    async with router.client() as client:
        before = left(await client.post("/v1/completions", json=body))
        await ask(router, "/v1/completions", body)
        after = left(await client.post("/v1/completions", json=body))
    assert 0 < before - after <= 4 + 6  # one request of the two, and what the time between has brought


def requests_left(response: httpx.Response) -> int:
    return int(response.headers["x-ratelimit-remaining-requests"])


@pytest.mark.parametrize("name", ["text", "choices", "chat", "responses", "messages"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_told_again_needs_no_quota(tmp_path: Path, name: str, stream: bool) -> None:
    path, body, text = CALLS[name]
    body = body | {"stream": stream}
    router = served(tmp_path, text, quota=QuotaLimits(None, 2, 200))
    first = await ask(router, path, body)
    assert requests_left(first) == 1
    for _ in range(3):
        again = await ask(router, path, body)
        assert (again.headers["idempotent-replayed"], requests_left(again)) == ("true", 1)
    async with router.client() as client:
        spent = await client.post(path, json=body | {"stream": False})
        assert spent.status_code == 200, spent.text
        assert (await client.post(path, json=body)).status_code == 429
    assert (await ask(router, path, body, **{"idempotency-key": "new"})).status_code == 429
    again = await ask(router, path, body)
    assert again.status_code == 200 and requests_left(again) == 0


async def test_an_answer_that_is_told_again_needs_no_tokens(tmp_path: Path) -> None:
    router = served(tmp_path, "Hello", quota=QuotaLimits(None, None, 60))
    body = {"prompt": "ab", "max_tokens": 40}
    first = await ask(router, "/v1/completions", body)
    async with router.client() as client:
        refused = [(await client.post("/v1/completions", json=body)).status_code for _ in range(4)]
    assert refused[-1] == 429  # 7 of its 42 tokens are used each time
    again = await ask(router, "/v1/completions", body)
    assert (again.status_code, again.json()) == (200, first.json())


async def test_who_takes_over_an_answer_that_is_told_pays_a_request_and_the_rest_of_it(tmp_path: Path) -> None:
    router = served(tmp_path, script=Script("Hello, world", hold_at=5), quota=QuotaLimits(None, 2, 100))
    body = {"prompt": "ab", "max_tokens": 40, "stream": True}
    older = asyncio.create_task(ask(router, "/v1/completions", body))
    await router.dispatcher.held.wait()
    for _ in range(20):
        await asyncio.sleep(0)
    assert has_told(file_in(tmp_path))
    router.script.hold_at = None
    newer = await ask(router, "/v1/completions", body)
    assert '"code":"taken_over"' in (await older).text
    assert newer.headers["idempotent-replayed"] == "true" and requests_left(newer) == 0
    assert "".join(json.loads(event[6:])["choices"][0]["text"] for _, event in told(newer)) == "Hello, world"
    assert newer.headers["x-ratelimit-remaining-tokens"] == "58"  # the prompt's 2 are paid, 40 told or to come
    router.dispatcher.clock.advance(200)
    async with router.client() as client:
        after = await client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 1})
    assert after.headers["x-ratelimit-remaining-tokens"] == "97"


async def test_taking_over_an_answer_again_and_again_has_workers_begin_no_more_than_the_quota(tmp_path: Path) -> None:
    router = served(tmp_path, script=Script("Hello, world", hold_at=5), quota=QuotaLimits(None, 2, None))
    body = {"prompt": "ab", "max_tokens": 40, "stream": True}
    asking: list[asyncio.Task[httpx.Response]] = []
    for number in range(8):
        asking.append(asyncio.create_task(ask(router, "/v1/completions", body)))
        async with asyncio.timeout(10):  # until it has the answer, or is refused
            while len(router.dispatcher.requests) <= number and not asking[-1].done():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await router.dispatcher.held.wait()
            while not has_told(file_in(tmp_path)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert len(router.dispatcher.requests) == 2 + 2  # two of them as debts, which a minute pays
    assert [each.done() and each.result().status_code for each in asking] == [200] * 3 + [False] + [429] * 4
    asking[3].cancel()
    await asyncio.wait([asking[3]])


async def test_a_key_of_which_nothing_is_told_costs_as_a_new_one(tmp_path: Path) -> None:
    """Else one key, sent again and again, would have workers begin for nothing."""
    router = served(tmp_path, script=Script("Hello", fail_after=0), quota=QuotaLimits(None, 2, None))
    body = {"prompt": "ab", "max_tokens": 9}
    for status in (503, 503, 429):
        assert (await ask(router, "/v1/completions", body)).status_code == status
    assert len(router.dispatcher.requests) == 2


async def test_the_key_of_an_answer_lets_other_requests_in_as_debts_alone(tmp_path: Path) -> None:
    router = served(tmp_path, quota=QuotaLimits(None, 2, None))
    body = {"prompt": "ab", "max_tokens": 9}
    assert requests_left(await ask(router, "/v1/completions", body)) == 1
    other = await ask(router, "/v1/completions", body | {"max_tokens": 8})
    assert other.status_code == 422 and requests_left(other) == 0
    async with router.client() as client:
        bodies = ["{", json.dumps(body | {"prompt_logprobs": 1}), "{}"]
        headers = KEY | {"content-type": "application/json"}
        refused = [await client.post("/v1/completions", content=each, headers=headers) for each in bodies]
        counted = await client.post("/v1/messages/count_tokens", json={"messages": CHAT}, headers=KEY)
    assert [each.status_code for each in refused] == [400, 200, 429] and counted.status_code == 429
    assert (await ask(router, "/v1/completions", body)).status_code == 429  # who had answers that were no repeats


async def test_what_is_not_told_again_after_all_is_paid_for(tmp_path: Path) -> None:
    body = {"prompt": "ab", "max_tokens": 9}
    await ask(served(tmp_path), "/v1/completions", body)
    other = ServedModel(MODEL, 2048, VOCAB_SIZE, quantization="fp8")
    limits = QuotaLimits(None, 1, 30)
    router = serve(Script("Hello"), model=other, kept_answers=KeptAnswers(tmp_path), quota=limits)
    new = await ask(router, "/v1/completions", body)
    assert new.status_code == 200 and "idempotent-replayed" not in new.headers
    assert (requests_left(new), new.headers["x-ratelimit-remaining-tokens"]) == (0, "19")
    async with router.client() as client:
        assert (await client.post("/v1/completions", json=body)).status_code == 429


@pytest.mark.parametrize(("quota", "num_looks"), [(None, 0), (QuotaLimits(3, None, None), 0), (QuotaLimits(3, 9), 1)])
async def test_the_folder_is_looked_into_before_a_body_is_read_only_where_there_are_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: QuotaLimits | None, num_looks: int
) -> None:
    looks: list[Path] = []

    def look(path: Path) -> bool:
        looks.append(path)
        return False

    monkeypatch.setattr("kvferry.router.kept.answers.has_told", look)
    router = served(tmp_path, quota=quota)
    body = {"prompt": "ab", "max_tokens": 9}
    assert (await ask(router, "/v1/completions", body)).status_code == 200
    async with router.client() as client:
        assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert len(looks) == num_looks


async def test_a_key_is_one_callers_and_one_requests(tmp_path: Path) -> None:
    router = served(tmp_path, api_keys=("alice", "bob"))
    body = {"prompt": "ab", "max_tokens": 4}
    for key in ("alice", "bob"):
        response = await ask(router, "/v1/completions", body, authorization=f"Bearer {key}")
        assert response.status_code == 200 and "idempotent-replayed" not in response.headers
    alice = {"authorization": "Bearer alice"}
    other = await ask(router, "/v1/completions", body | {"max_tokens": 5}, **alice)
    assert other.status_code == 422 and other.json()["error"]["code"] == "idempotency_key_reused"
    elsewhere = await ask(router, "/v1/chat/completions", {"messages": CHAT}, **alice)
    assert elsewhere.status_code == 422
    same = await ask(router, "/v1/completions", dict(reversed(body.items())), **alice)  # the same body in other bytes
    assert same.status_code == 200 and same.headers["idempotent-replayed"] == "true"


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"idempotency-key": "a b"}, 400, "invalid_idempotency_key"),
        ({"idempotency-key": ""}, 400, "invalid_idempotency_key"),
        ({"idempotency-key": "x" * 256}, 400, "invalid_idempotency_key"),
        ({"last-event-id": "-1"}, 400, "invalid_last_event_id"),
        ({"last-event-id": "9" * 10}, 400, "invalid_last_event_id"),
        ({"last-event-id": "4"}, 409, "answer_not_kept"),
        ({"last-event-id": "0"}, 200, ""),
        ({"last-event-id": ""}, 200, ""),
        ({"idempotency-key": "x" * 255}, 200, ""),
    ],
)
async def test_headers_that_can_not_be_read_are_refused(
    tmp_path: Path, headers: dict[str, str], status: int, code: str
) -> None:
    router = served(tmp_path)
    response = await ask(router, "/v1/completions", {"prompt": "ab", "max_tokens": 4}, **headers)
    assert response.status_code == status
    assert not code or response.json()["error"]["code"] == code
    assert len(router.dispatcher.requests) == (status == 200)


async def test_two_keys_are_refused(tmp_path: Path) -> None:
    async with served(tmp_path).client() as client:
        headers = [("idempotency-key", "a"), ("idempotency-key", "b")]
        response = await client.post("/v1/completions", json={"prompt": "ab"}, headers=headers)
    assert response.status_code == 400 and "more than one" in response.text


async def test_an_event_that_the_answer_never_had_is_refused(tmp_path: Path) -> None:
    router = served(tmp_path, "Hello")
    body = {"prompt": "ab", "max_tokens": 9, "stream": True}
    await ask(router, "/v1/completions", body)
    response = await ask(router, "/v1/completions", body, **{"last-event-id": "77"})
    assert '"code":"unknown_event"' in response.text and "[DONE]" not in response.text


@pytest.mark.parametrize("is_kept", [True, False])
async def test_what_can_not_be_kept_is_answered_and_says_so(tmp_path: Path, is_kept: bool) -> None:
    """Prompt logprobs are not kept; and where there is no folder, nothing is."""
    router = served(tmp_path) if is_kept else serve(Script("Hello"))
    body = {"prompt": "ab", "max_tokens": 9} | ({"prompt_logprobs": 1} if is_kept else {"stream": True})
    response = await ask(router, "/v1/completions", body)
    assert response.status_code == 200 and response.headers["x-kvferry-ignored"] == "Idempotency-Key"
    assert told(response) == []


async def test_embeddings_and_lists_need_no_key(tmp_path: Path) -> None:
    async with served(tmp_path).client() as client:
        assert (await client.get("/v1/models", headers=KEY)).status_code == 200
    assert names_in(tmp_path) == ["events", "responses", "tasks", "wanted"]


async def test_without_a_key_no_event_has_a_number(tmp_path: Path) -> None:
    async with served(tmp_path).client() as client:
        response = await client.post("/v1/completions", json={"prompt": "ab", "stream": True})
    assert told(response) == [] and names_in(tmp_path) == ["events", "responses", "tasks", "wanted"]
