"""Answers that must call: the schema of their text, and that it is read back as calls."""

from __future__ import annotations

import json
from typing import Any

from kvferry.router.turns.call_reader import read_calls
from kvferry.router.turns.definitions import ToolUse, parse_tool_use
from kvferry.router.turns.dialect import Dialect
from kvferry.router.turns.forced import forced_grammar
from kvferry.router.turns.syntax import Call

TREE = {
    "type": "object",
    "$defs": {"Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}}},
    "properties": {"root": {"$ref": "#/$defs/Node"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "plant", "parameters": TREE}},
    {"type": "function", "function": {"name": "wait"}},
]


def _use(choice: object, parallel: bool | None = None) -> ToolUse:
    return parse_tool_use(TOOLS, choice, parallel)


def _schema(use: ToolUse) -> Any:
    grammar = forced_grammar(use)
    assert grammar is not None and grammar.kind == "json_schema"
    return json.loads(grammar.text)


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_text_needs_no_grammar() -> None:
    assert forced_grammar(_use("auto")) is None and forced_grammar(_use("none")) is None


def test_required_calls_are_an_array_of_any_tools() -> None:
    schema = _schema(_use("required"))
    assert (schema["type"], schema["minItems"]) == ("array", 1)
    calls = schema["items"]["anyOf"]
    assert [call["properties"]["name"]["const"] for call in calls] == ["search", "plant", "wait"]
    assert calls[2]["properties"]["arguments"] == {"type": "object"}
    assert all(list(call["properties"]) == call["required"] == ["name", "arguments"] for call in calls)


def test_arguments_that_nobody_declared_do_not_come() -> None:
    search, plant, wait = _schema(_use("required"))["items"]["anyOf"]
    assert search["properties"]["arguments"]["additionalProperties"] is False
    assert plant["properties"]["arguments"]["additionalProperties"] is False
    assert "additionalProperties" not in wait["properties"]["arguments"]  # it declares none: any may come
    parameters = {"type": "object", "properties": {}, "additionalProperties": True}
    open_tool = {"type": "function", "function": {"name": "open", "parameters": parameters}}
    (call,) = _schema(parse_tool_use([open_tool], "required", False))["anyOf"]
    assert call["properties"]["arguments"]["additionalProperties"] is True


def test_one_call_is_an_object() -> None:
    assert [call["properties"]["name"]["const"] for call in _schema(_use(_named("plant")))["anyOf"]] == ["plant"]
    assert len(_schema(_use("required", False))["anyOf"]) == 3


def test_references_within_a_tools_schema_lead_to_its_new_place() -> None:
    for choice, place in (("required", "#/items/anyOf/1"), (_named("plant"), "#/anyOf/0")):
        schema = _schema(_use(choice))
        (arguments,) = [
            call["properties"]["arguments"]
            for call in schema.get("items", schema)["anyOf"]
            if call["properties"]["name"]["const"] == "plant"
        ]
        moved = f"{place}/properties/arguments/$defs/Node"
        assert arguments["properties"]["root"]["$ref"] == moved
        assert arguments["$defs"]["Node"]["properties"]["next"]["$ref"] == moved
        found = schema
        for part in moved.removeprefix("#/").split("/"):
            found = found[int(part)] if isinstance(found, list) else found[part]
        assert found["type"] == "object"


def test_a_forced_text_is_read_as_calls_whatever_the_models_form() -> None:
    dialect = Dialect.of_template("{{ tools }}[TOOL_CALLS]</think>", variables={"tools"}).without_reasoning
    for text, names in (
        ('[{"name": "search", "arguments": {"a": 1}}, {"name": "wait", "arguments": {}}]', ["search", "wait"]),
        ('{\n  "name": "wait",\n  "arguments": {}\n}', ["wait"]),
    ):
        content, calls = read_calls(text, dialect.syntax(_use("required")))
        assert not content and [call.name for call in calls] == names
    cut = read_calls('[{"name": "search", "arguments": {"a', dialect.syntax(_use("required")))
    assert cut == ("", [Call("search", '{"a')])
    assert not dialect.reasons
