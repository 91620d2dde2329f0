"""Answers that must call: the schema of their text, and that it is read back as calls."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from kvferry.router.turns.definitions import ToolUse, parse_tool_use
from kvferry.router.turns.dialect import Dialect
from kvferry.router.turns.forced import forced_grammar
from kvferry.router.turns.syntax import Call

from .samples import read_calls

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


def test_tools_that_are_not_allowed_are_in_no_required_call() -> None:
    chosen = {"mode": "required", "tools": [_named("wait"), _named("search")]}
    schema = _schema(_use({"type": "allowed_tools", "allowed_tools": chosen}))
    assert [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]] == ["search", "wait"]


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


def _tool(name: str, kind: object, reference: str, **more: object) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"a": {"$ref": reference}},
        "required": ["a"],
        "$defs": {"A": kind},
        **more,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (
            _tool("f", {"type": "integer"}, "#/$defs/A", **{"$id": "https://x.example/f"}),
            _tool("g", {"type": "string"}, "#/$defs/A", **{"$id": "https://x.example/g"}),
        ),
        (
            _tool("f", {"type": "integer"}, "https://x.example/f#/$defs/A", **{"$id": "https://x.example/f#"}),
            _tool("g", {"type": "string"}, "g#/$defs/A", **{"$id": "g"}),
        ),
        (
            _tool("f", {"type": "integer", "$anchor": "kind"}, "#kind"),
            _tool("g", {"type": "string", "$anchor": "kind"}, "#kind"),
        ),
        (
            _tool(
                "f",
                {"$id": "https://x.example/a", "$ref": "#/$defs/b", "$defs": {"b": {"type": "integer"}}},
                "#/$defs/A",
            ),
            _tool("g", {"type": "string"}, "#/$defs/A"),
        ),
    ],
)
@pytest.mark.parametrize("parallel", [True, False])
def test_schemas_with_names_of_their_own_stand_beside_each_other(
    number: dict[str, Any], text: dict[str, Any], parallel: bool
) -> None:
    """Each reference leads to its own tool's part: a library that follows it finds it, and finds the right one."""
    grammar = forced_grammar(parse_tool_use([number, text], "required", parallel))
    assert grammar is not None
    schema = json.loads(grammar.text)
    for name, value, is_valid in (("f", 1, True), ("g", "x", True), ("f", "x", False), ("g", 1, False)):
        call = {"name": name, "arguments": {"a": value}}
        answer = [call] if parallel else call
        assert jsonschema.Draft202012Validator(schema).is_valid(answer) == is_valid


def test_values_that_look_like_references_stay() -> None:
    parameters = {"type": "object", "properties": {"a": {"enum": [{"$ref": "#/x"}]}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    (call,) = _schema(parse_tool_use([tool], "required", False))["anyOf"]
    assert call["properties"]["arguments"]["properties"] == parameters["properties"]


def test_a_value_is_data_and_a_property_of_that_name_is_none() -> None:
    """A `const` that looks like a reference is what must come; references beside it, under the same word, are moved."""
    looks_so = {"$ref": "#/x", "$anchor": "a"}
    parameters = {
        "type": "object",
        "$defs": {"x": {"type": "string"}},
        "properties": {
            "a": {"const": looks_so, "default": looks_so, "examples": [looks_so]},
            "const": {"$ref": "#/$defs/x"},
        },
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    arguments = _schema(parse_tool_use(tools, _named("f"), None))["anyOf"][0]["properties"]["arguments"]
    assert arguments["properties"]["a"] == parameters["properties"]["a"]  # type: ignore[index]
    assert arguments["properties"]["const"] == {"$ref": "#/anyOf/0/properties/arguments/$defs/x"}


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
