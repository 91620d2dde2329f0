"""Custom tools of /v1/responses: the model calls a function of one text, the client sees the text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import ResponseCustomToolCall
from openai.types.responses.response_custom_tool_call_item import ResponseCustomToolCallItem

from kvferry.common.grammar import CheckedGrammar, Grammar, pack_mask
from kvferry.router.catalogue.version import ServedModel
from kvferry.router.responses.custom import input_of

from ..fakes import MODEL, VOCAB_SIZE, Script, Served, serve, typed_events

PATCH = {"type": "custom", "name": "patch", "description": "Apply a patch.", "format": {"type": "text"}}
FUNCTION = {"type": "function", "name": "read", "parameters": {"type": "object", "properties": {}}, "strict": False}
TEXT = '*** Begin\n+"é"\n'
HI = {"role": "user", "content": "hi"}


def _call(name: str = "patch", arguments: object = None) -> str:
    told = {"name": name, "arguments": {"input": TEXT} if arguments is None else arguments}
    return f"<tool_call>\n{json.dumps(told, ensure_ascii=False)}\n</tool_call>"


def _served(text: str) -> Served:
    return serve(Script(text), model=ServedModel(MODEL, 4096, VOCAB_SIZE))


async def _post(served: Served, **fields: Any) -> Any:
    async with served.client() as client:
        return await client.post("/v1/responses", json={"model": MODEL, "input": "hi", "tools": [PATCH], **fields})


def _prompt(served: Served) -> str:
    return bytes(served.request.prompt_token_ids).decode()


async def test_a_call_has_the_text_itself() -> None:
    served = _served(_call())
    response = await _post(served, tools=[FUNCTION, PATCH])
    assert response.status_code == 200, response.text
    (item,) = response.json()["output"]
    call = ResponseCustomToolCallItem.model_validate(item)
    assert (call.type, call.name, call.input, call.status) == ("custom_tool_call", "patch", TEXT, "completed")
    assert call.id.startswith("ctc_") and call.call_id and "arguments" not in item
    assert response.json()["tools"][1] == PATCH
    prompt = _prompt(served)
    assert '"Apply a patch."' in prompt and '"required": ["input"]' in prompt and "format" not in prompt


async def test_a_stream_tells_the_text_when_it_is_whole() -> None:
    events = typed_events((await _post(_served(_call()), stream=True)).text)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "custom_tool_call_input.delta"),
        *("custom_tool_call_input.done", "output_item.done", "completed"),
    ]
    added, delta, done, ended = events[2:6]
    assert (added["item"]["input"], added["item"]["status"]) == ("", "in_progress")
    assert delta["delta"] == done["input"] == ended["item"]["input"] == TEXT
    assert delta["item_id"] == done["item_id"] == added["item"]["id"] == ended["item"]["id"]
    assert ResponseCustomToolCall.model_validate(ended["item"]) and events[6]["response"]["output"] == [ended["item"]]


@pytest.mark.parametrize("is_kept", [False, True])
async def test_an_earlier_call_and_its_output_are_told_and_shown(is_kept: bool) -> None:
    served = _served(_call())
    first = (await _post(served)).json()
    (call,) = first["output"]
    output = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "Done."}
    given: dict[str, Any] = {"input": [HI, call, output]}
    if is_kept:
        given = {"input": [output], "previous_response_id": first["id"]}
    served.script.text = "Good."
    second = (await _post(served, **given)).json()
    assert f"{_call()}<user><tool_response>\nDone." in _prompt(served)
    async with served.client() as client:
        shown = (await client.get(f"/v1/responses/{second['id']}/input_items", params={"order": "asc"})).json()["data"]
    assert [each["type"] for each in shown] == ["message", "custom_tool_call", "custom_tool_call_output"]
    assert (shown[1]["input"], shown[1]["name"], shown[2]["output"]) == (TEXT, "patch", "Done.")


async def test_a_namespaces_custom_tool_has_both_names() -> None:
    tools = [{"type": "namespace", "name": "files", "tools": [PATCH]}]
    (item,) = (await _post(_served(_call("files__patch")), tools=tools)).json()["output"]
    assert (item["type"], item["name"], item["namespace"]) == ("custom_tool_call", "patch", "files")


async def test_a_grammar_of_the_text_is_told_to_bind_nothing() -> None:
    lark = {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}
    response = await _post(_served(_call()), tools=[FUNCTION, {**PATCH, "format": lark}])
    assert response.json()["output"][0]["input"] == TEXT
    assert "tools[1].format" in response.headers["x-kvferry-ignored"].split(",")
    refused = (await _post(_served(""), tools=[{**PATCH, "format": {"type": "regex"}}])).json()["error"]
    assert refused["param"] == "tools[0].format"


class _Checker:
    """Takes every grammar."""

    async def check(self, grammar: Grammar, param: str) -> CheckedGrammar:
        return CheckedGrammar(grammar, pack_mask(b"\xff" * 4))

    def close(self) -> None: ...


async def test_a_custom_tool_can_be_chosen() -> None:
    named = {"type": "custom", "name": "patch"}
    forced = json.dumps([{"name": "patch", "arguments": {"input": TEXT}}])
    served = serve(Script(forced), model=ServedModel(MODEL, 4096, VOCAB_SIZE), grammars=_Checker())
    response = await _post(served, tools=[FUNCTION, PATCH], tool_choice=named)
    (item,) = response.json()["output"]
    assert (item["type"], item["input"], response.json()["tool_choice"]) == ("custom_tool_call", TEXT, named)
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [named]}
    assert (await _post(_served(""), tools=[FUNCTION, PATCH], tool_choice=allowed)).status_code == 200
    unknown = await _post(_served(""), tools=[FUNCTION], tool_choice=named)
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "tool_choice.name")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": "a\\nb"}', "a\nb"),
        ('{"input": "a\\nb', "a\nb"),  # an answer that was cut
        ('{"input": "a\\', "a"),
        ('{"inp', ""),
        ("{}", ""),
        ("", ""),
        ('{"text": "a"}', '{"text": "a"}'),
        ('{"input": 5}', '{"input": 5}'),
        ("a patch", "a patch"),
    ],
)
def test_other_arguments_are_the_text(arguments: str, text: str) -> None:
    assert input_of(arguments) == text


async def test_what_is_wrong_is_named_by_the_clients_place() -> None:
    call = {"type": "custom_tool_call", "call_id": "a", "name": "patch", "input": 5}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tools": [{**PATCH, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{**PATCH, "colour": 1}]}, "tools[0].colour"),
        ({"tools": [FUNCTION, {**PATCH, "parameters": {}}]}, "tools[1].parameters"),
        ({"input": [HI, call]}, "input[1].input"),
        ({"input": [HI, {**call, "input": "x", "name": 5}]}, "input[1].name"),
        ({"input": [HI, {"type": "custom_tool_call_output", "call_id": "", "output": "x"}]}, "input[1].call_id"),
    ]
    for fields, param in cases:
        refused = await _post(_served(""), **fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text
