"""Responses that are kept are shown, with what they answer, and forgotten; inputs are counted."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from kvferry.router.access.keys import ApiKeys
from kvferry.router.catalogue.version import ServedModel
from kvferry.router.responses.kept import KeptResponses
from kvferry.router.responses.store import MemoryStore
from kvferry.tests.fake_clock import FakeClock

from ..fakes import MODEL, VOCAB_SIZE, Script, Served, serve, typed_events

CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>'
TOOLS = [{"type": "function", "name": "search", "parameters": {"type": "object", "properties": {}}, "strict": False}]
PATH = "/v1/responses"


def _served(text: str = "Hello", **options: Any) -> Served:
    return serve(Script(text), model=ServedModel(MODEL, 4096, VOCAB_SIZE, reasoning_parser="think"), **options)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_response_is_shown_as_it_was_answered(is_streamed: bool) -> None:
    async with _served().client() as client:
        body = {"input": "hi", "instructions": "Be brief.", "metadata": {"a": "b"}, "stream": is_streamed}
        answer = await client.post(PATH, json=body)
        said: Any = typed_events(answer.text)[-1]["response"] if is_streamed else answer.json()
        shown = await client.get(f"{PATH}/{said['id']}")
    assert (shown.status_code, shown.json()) == (200, said)


async def test_what_a_response_answers_is_told_as_items_earlier_turns_included() -> None:
    served = _served(f"<think>Hm.</think>{CALL}")
    async with served.client() as client:
        first = (await client.post(PATH, json={"input": "hi", "tools": TOOLS, "instructions": "Be brief."})).json()
        served.script.text = "There."
        (call,) = [item for item in first["output"] if item["type"] == "function_call"]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "found"}
        said = {"role": "developer", "content": "Be kind."}
        body = {"input": [result, said], "tools": TOOLS, "previous_response_id": first["id"]}
        second = (await client.post(PATH, json=body)).json()
        path = f"{PATH}/{second['id']}/input_items"
        items = (await client.get(path, params={"order": "asc"})).json()
        newest = (await client.get(path, params={"limit": 2})).json()
        older = (await client.get(path, params={"after": newest["last_id"]})).json()
    user, thought, called, found, kind = items["data"]
    assert (user["role"], user["content"]) == ("user", [{"type": "input_text", "text": "hi"}])
    assert (thought["type"], thought["content"][0]["text"]) == ("reasoning", "Hm.")
    assert (called["type"], called["call_id"], called["name"]) == ("function_call", call["call_id"], "search")
    assert called["arguments"] == call["arguments"]
    assert (found["type"], found["call_id"], found["output"]) == ("function_call_output", call["call_id"], "found")
    assert (kind["role"], kind["content"][0]["text"]) == ("developer", "Be kind.")
    assert (items["object"], items["has_more"]) == ("list", False)
    assert (items["first_id"], items["last_id"]) == (user["id"], kind["id"])
    assert (newest["data"], newest["has_more"]) == ([kind, found], True)
    assert (older["data"], older["has_more"]) == ([called, thought, user], False)


async def _items_of(client: httpx.AsyncClient, said: dict[str, Any]) -> list[dict[str, Any]]:
    response = await client.get(f"{PATH}/{said['id']}/input_items", params={"order": "asc"})
    assert response.status_code == 200, response.text
    items: list[dict[str, Any]] = response.json()["data"]
    return items


async def test_items_that_are_listed_can_be_referred_to_under_their_ids() -> None:
    served = _served("x" * 40)
    async with served.client() as client:
        first = (await client.post(PATH, json={"input": "hi", "max_output_tokens": 3})).json()
        [answer] = first["output"]
        assert answer["status"] == "incomplete"
        body = {"input": "again", "previous_response_id": first["id"]}
        second = (await client.post(PATH, json=body)).json()
        asked, before, more = listed = await _items_of(client, second)
        assert before == answer and [asked] == await _items_of(client, first)
        assert (more["content"], more["status"]) == ([{"type": "input_text", "text": "again"}], "completed")
        references = [{"type": "item_reference", "id": item["id"]} for item in listed]
        referred = (await client.post(PATH, json={"input": references})).json()
        prompt = served.request.prompt_token_ids
        assert await _items_of(client, referred) == listed
        await client.post(PATH, json=body)
        assert served.request.prompt_token_ids == prompt


async def test_items_are_listed_as_they_came() -> None:
    parts = [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]
    given: list[dict[str, Any]] = [
        {"type": "message", "role": "user", "id": "msg_mine", "content": parts},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "thought"}]},
        {"type": "web_search_call", "id": "ws_1", "status": "failed"},
        {"type": "function_call", "id": None, "call_id": "c1", "name": "search", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": parts},
        {"role": "assistant", "content": "A", "status": "incomplete"},
        {"role": "user", "content": "z"},
    ]
    async with _served().client() as client:
        said = (await client.post(PATH, json={"input": given, "tools": TOOLS})).json()
        listed = await _items_of(client, said)
        name = said["id"].removeprefix("resp_")
        ids = ["msg_mine", "rs_1", "ws_1", f"fc_{name}_in3", f"fco_{name}_in4", f"msg_{name}_in5", f"msg_{name}_in6"]
        assert [item["id"] for item in listed] == ids
        assert listed[0] == {**given[0], "status": "completed"}
        assert listed[1:3] == given[1:3]
        assert listed[3] == {**given[3], "id": ids[3], "status": "completed"}
        assert listed[4] == {**given[4], "id": ids[4], "status": "completed"}
        assert (listed[5]["status"], listed[5]["content"][0]["type"]) == ("incomplete", "output_text")
        # A client's own ids are found in the conversation that goes on.
        reference = {"type": "item_reference", "id": "msg_mine"}
        body = {"input": [reference], "previous_response_id": said["id"]}
        assert (await client.post(PATH, json=body)).status_code == 200
        refused = await client.post(PATH, json={"input": [reference]})
        assert refused.json()["error"]["code"] == "item_not_found"


async def test_items_with_an_id_of_others_get_one_of_their_own_so_that_pages_end() -> None:
    async with _served("x" * 40).client() as client:
        given = [{"role": "user", "content": text, "id": "mine"} for text in "ab"]
        first = (await client.post(PATH, json={"input": given})).json()
        again = [*first["output"], {"type": "item_reference", "id": "mine"}, {"role": "user", "content": "c"}]
        body = {"input": again, "previous_response_id": first["id"]}
        second = (await client.post(PATH, json=body)).json()
        names = [each["id"].removeprefix("resp_") for each in (first, second)]
        [answer] = first["output"]
        ids = ["mine", f"msg_{names[0]}_in1", answer["id"], *(f"msg_{names[1]}_in{at}" for at in range(3))]
        found, asked = [], {"order": "asc", "limit": "1"}
        for _ in ids:
            page = (await client.get(f"{PATH}/{second['id']}/input_items", params=asked)).json()
            found += page["data"]
            asked["after"] = page["last_id"]
        assert [item["id"] for item in found] == ids and not page["has_more"]
        assert [item["content"][0]["text"] for item in found][::4] == ["a", "a"], "what is referred to comes again"


@pytest.mark.parametrize("arguments", ['{"a": 1}', "{x", "", None])
@pytest.mark.parametrize("custom", [[], [{"type": "custom_tool_call", "call_id": "2", "name": "g", "input": "y"}]])
async def test_a_calls_arguments_are_shown_as_the_text_that_they_came_as(
    arguments: str | None, custom: list[dict[str, Any]]
) -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f" if custom else "g", "arguments": arguments}
    async with _served().client() as client:
        said = (await client.post(PATH, json={"input": [{"role": "user", "content": "x"}, call, *custom]})).json()
        shown = await client.get(f"{PATH}/{said['id']}/input_items", params={"order": "asc"})
        same_name = [{"role": "user", "content": "x"}, {**call, "name": "g"}, *custom]
        said = (await client.post(PATH, json={"input": same_name})).json()
        assert (await client.get(f"{PATH}/{said['id']}/input_items")).status_code == 200
    assert (shown.json()["data"][1]["type"], shown.json()["data"][1]["arguments"]) == ("function_call", arguments or "")


async def test_what_is_forgotten_or_anothers_is_not_found() -> None:
    served = _served(keys=ApiKeys(("key-1", "key-2")))
    async with served.client(authorization="Bearer key-1") as client:
        said = (await client.post(PATH, json={"input": "hi"})).json()
        unkept = (await client.post(PATH, json={"input": "hi", "store": False})).json()
        async with served.client(authorization="Bearer key-2") as other:
            for method, end in (("GET", ""), ("GET", "/input_items"), ("DELETE", "")):
                _assert_not_found(await other.request(method, f"{PATH}/{said['id']}{end}"))
        deleted = await client.delete(f"{PATH}/{said['id']}")
        assert deleted.json() == {"id": said["id"], "object": "response", "deleted": True}
        for name in (said["id"], unkept["id"], "x"):
            _assert_not_found(await client.get(f"{PATH}/{name}"))
            _assert_not_found(await client.delete(f"{PATH}/{name}"))
        body = {"input": "more", "previous_response_id": said["id"]}
        assert (await client.post(PATH, json=body)).status_code == 400


def _assert_not_found(response: Any) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "response_not_found", "response_id")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=101", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=x", "after"),
        ("?stream=true", "stream"),
    ],
)
async def test_a_refusal_names_the_parameter(asked: str, param: str) -> None:
    async with _served().client() as client:
        said = (await client.post(PATH, json={"input": "hi"})).json()
        refused = await client.get(f"{PATH}/{said['id']}{asked}")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_the_tokens_of_an_input_are_counted_as_they_are_answered() -> None:
    served = _served()
    async with served.client() as client:
        first = (await client.post(PATH, json={"input": "hi"})).json()
        body = {"input": "more", "tools": [*TOOLS, {"type": "web_search"}], "previous_response_id": first["id"]}
        counted = await client.post(f"{PATH}/input_tokens", json=body)
        num_requests = len(served.dispatcher.requests)
        answered = (await client.post(PATH, json=body)).json()
    assert counted.json() == {"object": "response.input_tokens", "input_tokens": answered["usage"]["input_tokens"]}
    assert counted.headers["x-kvferry-ignored"] == "tools[1]" and num_requests == 1


def test_what_is_forgotten_takes_no_memory() -> None:
    kept = KeptResponses(store := MemoryStore(FakeClock(0.0)))
    kept.keeper("resp_a", b"", [{"role": "user", "content": "hi"}], [], b"x" * 5000)()
    assert store.num_bytes > 5000
    kept.forget("resp_a", b"")
    assert store.num_bytes == 0
