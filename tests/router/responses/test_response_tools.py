"""Tools of /v1/responses as agents send them: namespaces, and what only OpenAI runs."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.router.catalogue.version import ServedModel
from kvferry.router.responses.items import input_messages

from ..fakes import MODEL, VOCAB_SIZE, Script, Served, serve, typed_events

FUNCTION = {"type": "function", "name": "read", "parameters": {"type": "object", "properties": {}}, "strict": False}
NOTES = {"type": "namespace", "name": "mcp__notes__", "description": "Notes.", "tools": [FUNCTION]}
SEARCH = {"type": "web_search", "external_web_access": True}
CALL = '<tool_call>\n{"name": "mcp__notes__read", "arguments": {"id": 7}}\n</tool_call>'
CALLED = {"name": "read", "namespace": "mcp__notes__", "arguments": '{"id": 7}'}


def _served(text: str = "Hello") -> Served:
    return serve(Script(text), model=ServedModel(MODEL, 4096, VOCAB_SIZE))


async def _post(served: Served, **fields: Any) -> Any:
    async with served.client() as client:
        return await client.post("/v1/responses", json={"model": MODEL, "input": "hi", **fields})


def _prompt(served: Served) -> str:
    return bytes(served.request.prompt_token_ids).decode()


async def test_what_only_openai_runs_is_left_out_beside_functions_and_told() -> None:
    served = _served()
    response = await _post(served, tools=[SEARCH, FUNCTION], client_metadata={"thread_id": "1"}, max_tool_calls=3)
    assert response.status_code == 200, response.text
    assert response.headers["x-kvferry-ignored"] == "tools[0]"
    assert '"read"' in _prompt(served) and "web_search" not in _prompt(served)
    assert "x-kvferry-ignored" not in (await _post(served, tools=[FUNCTION])).headers


async def test_a_refused_choice_is_told_the_form_that_is_taken() -> None:
    """A chat's form would be refused in the same words."""
    for refused in ({"type": "function"}, {"type": "some_tools", "mode": "auto"}):
        error = (await _post(_served(), tools=[FUNCTION], tool_choice=refused)).json()["error"]
        assert error["param"] == "tool_choice" and 'or {"type": "function", "name": ...}, got' in error["message"]


async def test_a_namespaces_function_is_called_by_both_names() -> None:
    served = _served(CALL)
    answer = (await _post(served, tools=[FUNCTION, NOTES])).json()
    assert '"mcp__notes__read"' in _prompt(served) and '"read"' in _prompt(served)
    (item,) = answer["output"]
    assert {name: item[name] for name in CALLED} == CALLED
    events = typed_events((await _post(served, tools=[FUNCTION, NOTES], stream=True)).text)
    for kind in ("response.output_item.added", "response.output_item.done"):
        (event,) = [each for each in events if each["type"] == kind]
        assert (event["item"]["name"], event["item"]["namespace"]) == ("read", "mcp__notes__")
    (done,) = [each for each in events if each["type"] == "response.function_call_arguments.done"]
    assert done["name"] == "read"


@pytest.mark.parametrize("is_kept", [False, True])
async def test_an_earlier_call_in_a_namespace_is_told_as_it_was_made(is_kept: bool) -> None:
    served = _served(CALL)
    first = (await _post(served, tools=[NOTES])).json()
    (call,) = first["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "found"}
    if is_kept:
        again = {"input": [result], "previous_response_id": first["id"]}
    else:
        again = {"input": [{"role": "user", "content": "hi"}, call, result]}
    assert (await _post(served, tools=[NOTES], **again)).status_code == 200
    assert f"{CALL}<user><tool_response>\nfound" in _prompt(served)


@pytest.mark.parametrize("is_kept", [False, True])
async def test_an_earlier_call_in_a_namespace_is_shown_by_both_names(is_kept: bool) -> None:
    served = _served(CALL)
    first = (await _post(served, tools=[FUNCTION, NOTES])).json()
    (call,) = first["output"]
    served.script.text = "There."
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "found"}
    plain = {"type": "function_call", "call_id": "a", "name": "read", "arguments": "{}"}
    told = [result, plain, {**result, "call_id": "a"}]
    again: dict[str, Any] = {"input": told, "previous_response_id": first["id"]}
    if not is_kept:
        again = {"input": [{"role": "user", "content": "hi"}, call, *told]}
    second = (await _post(served, **again)).json()
    async with served.client() as client:
        items = (await client.get(f"/v1/responses/{second['id']}/input_items", params={"order": "asc"})).json()["data"]
    (shown, other) = [item for item in items if item["type"] == "function_call"]
    assert {name: shown[name] for name in CALLED} == {**CALLED, "arguments": call["arguments"]}
    assert other["name"] == "read" and "namespace" not in other


async def test_a_name_that_is_too_long_with_its_namespace_stands_alone() -> None:
    served = _served('<tool_call>\n{"name": "read", "arguments": {}}\n</tool_call>')
    answer = (await _post(served, tools=[{**NOTES, "name": "n" * 125}])).json()
    (item,) = answer["output"]
    assert (item["name"], item["namespace"]) == ("read", "n" * 125)


async def test_what_is_asked_of_a_tool_that_is_left_out_is_left_out() -> None:
    """Vercel's AI SDK asks for the sources of its web search tool."""
    served = _served()
    include = ["reasoning.encrypted_content", "web_search_call.action.sources"]
    response = await _post(served, tools=[SEARCH, FUNCTION], include=include)
    assert response.status_code == 200
    assert response.headers["x-kvferry-ignored"] == "tools[0],include[1]"
    others = [
        *("file_search_call.results", "code_interpreter_call.outputs", "computer_call_output.output.image_url"),
        *("web_search_call.results", "message.input_image.image_url"),
    ]
    told = (await _post(served, tools=[FUNCTION], include=others)).headers["x-kvferry-ignored"]
    assert told == "include[0],include[1],include[2],include[3]"  # of images there is nothing to include
    refused = await _post(served, tools=[SEARCH, FUNCTION], include=[*include, "some_call.results"])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "include")


@pytest.mark.parametrize(
    "kind",
    [
        *("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11", "tool_search"),
        *("file_search", "code_interpreter", "image_generation", "mcp", "computer", "computer_use_preview"),
        *("local_shell", "shell", "apply_patch"),
    ],
)
async def test_each_tool_that_nobody_runs_here_is_left_out_and_refused_alone(kind: str) -> None:
    response = await _post(_served(), tools=[FUNCTION, {"type": kind}])
    assert (response.status_code, response.headers["x-kvferry-ignored"]) == (200, "tools[1]")
    alone = (await _post(_served(), tools=[{"type": kind}])).json()["error"]
    assert alone["param"] == "tools[0].type" and f"'{kind}'" in alone["message"]
    chosen = await _post(_served(), tools=[FUNCTION, {"type": kind}], tool_choice={"type": kind})
    assert (chosen.status_code, chosen.json()["error"]["param"]) == (400, "tool_choice")


@pytest.mark.parametrize(
    "kind",
    [
        *("web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call", "mcp_list_tools"),
        *("mcp_call", "mcp_approval_request", "mcp_approval_response", "local_shell_call", "local_shell_call_output"),
        *("shell_call", "shell_call_output", "apply_patch_call", "apply_patch_call_output", "tool_search_call"),
        *("tool_search_output", "computer_call", "computer_call_output", "compaction"),
    ],
)
async def test_what_such_tools_did_elsewhere_is_left_out_and_told(kind: str) -> None:
    served, said = _served(), {"role": "user", "content": "hi"}
    response = await _post(served, input=[said, {"type": kind, "call_id": "a"}, {"role": "user", "content": "ho"}])
    assert response.status_code == 200, response.text
    assert response.headers["x-kvferry-ignored"] == "input[1]"
    assert _prompt(served) == "<user>hi<user>ho<assistant>"
    empty = await _post(served, input=[{"type": kind}])
    assert (empty.status_code, empty.json()["error"]["param"]) == (400, "input")


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([SEARCH], "tools[0].type"),
        ([SEARCH, {**FUNCTION, "name": "a b"}], "tools[1].name"),
        ([{"type": "file_search"}, SEARCH], "tools[0].type"),
        ([SEARCH, {"type": "web_search_20250826"}], "tools[1].type"),
        ([FUNCTION, {**NOTES, "tools": [FUNCTION, {"type": "some", "name": "patch"}]}], "tools[1].tools[1].type"),
        ([FUNCTION, {**NOTES, "tools": [{**FUNCTION, "strict": 1}]}], "tools[1].tools[0].strict"),
        ([{**NOTES, "tools": [NOTES]}], "tools[0].tools[0].type"),
        ([{**NOTES, "tools": None}], "tools[0].tools"),
        ([{**NOTES, "name": 5}], "tools[0].name"),
        ([FUNCTION, 5], "tools[1]"),
        (5, "tools"),
    ],
)
async def test_a_refusal_names_the_clients_place(tools: Any, param: str) -> None:
    response = await _post(_served(), tools=tools)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param) and error["message"].startswith(param)


def test_parts_that_are_told_together_stand_on_lines_of_their_own() -> None:
    """A tool's output in parts was one word, where /v1/messages tells lines; an answer in parts is one text."""
    parts = [{"type": "input_text", "text": text} for text in ("one", "two")]
    said = [{"type": "output_text", "text": text} for text in ("Look", "ing.")]
    items = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": said},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": parts},
    ]
    assert [each.message["content"] for each in input_messages(items, [])] == ["one\ntwo", "Looking.", "one\ntwo"]


async def test_half_a_surrogate_pair_in_arguments_is_a_question_mark() -> None:
    call = CALL.replace("mcp__notes__read", "read").replace("7", r'"\ud83d."')
    events = typed_events((await _post(_served(call), tools=[FUNCTION], stream=True)).text)
    kind = "response.function_call_arguments"
    told = "".join(event["delta"] for event in events if event["type"] == f"{kind}.delta")
    (done,) = [event for event in events if event["type"] == f"{kind}.done"]
    assert told == done["arguments"] == '{"id": "?."}'
