"""Objects are closed where nothing else looks at them, and an answer of a closed schema is one of the open one."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, given, settings

from kvferry.router.turns.values.closing import closed
from kvferry.tests.grammar.schema_strategies import INSTANCES, SCHEMAS

NO_MORE = {"additionalProperties": False}
A: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ADDRESS = {"$ref": "#/$defs/Address"}


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        (A, A | NO_MORE),
        ({"type": "object"}, {"type": "object"}),
        (A | {"required": ["b"]}, A | {"required": ["b"]}),
        (A | {"required": [["a"]]}, A | {"required": [["a"]]}),  # who compiles it says what is wrong
        (A | {"additionalProperties": True}, A | {"additionalProperties": True}),
        (A | {"patternProperties": {"^x": {}}}, A | {"patternProperties": {"^x": {}}}),
        (A | {"minProperties": 2}, A | {"minProperties": 2}),
        ({"type": "array", "items": A, "minItems": 1}, {"type": "array", "items": A | NO_MORE, "minItems": 1}),
        ({"prefixItems": [A, {"const": A}]}, {"prefixItems": [A | NO_MORE, {"const": A}]}),
        ({"anyOf": [A, {"type": "null"}]}, {"anyOf": [A | NO_MORE, {"type": "null"}]}),
        ({"oneOf": [A, {"properties": {}}]}, {"oneOf": [A, {"properties": {}}]}),
        ({"allOf": [A, {"properties": {"b": {}}}]}, {"allOf": [A, {"properties": {"b": {}}}]}),
        ({"not": A}, {"not": A}),
        (A | {"anyOf": [{"required": ["b"]}]}, A | {"anyOf": [{"required": ["b"]}]}),
        (
            {"type": "object", "properties": {"in": A, "list": {"items": A}}},
            {"type": "object", "properties": {"in": A | NO_MORE, "list": {"items": A | NO_MORE}}} | NO_MORE,
        ),
        (
            {"properties": {"at": ADDRESS, "or": {"anyOf": [ADDRESS, {"type": "null"}]}}, "$defs": {"Address": A}},
            {
                "properties": {"at": ADDRESS, "or": {"anyOf": [ADDRESS, {"type": "null"}]}},
                "$defs": {"Address": A | NO_MORE},
            }
            | NO_MORE,
        ),
        (
            {"properties": {"at": {"allOf": [ADDRESS, {"required": ["b"]}]}, "b": A}, "$defs": {"Address": A}},
            {
                "properties": {"at": {"allOf": [ADDRESS, {"required": ["b"]}]}, "b": A | NO_MORE},
                "$defs": {"Address": A},
            }
            | NO_MORE,
        ),
        ({"$id": "x", **A}, {"$id": "x", **A}),
        (A | {"default": {"b": 1}}, A | {"default": {"b": 1}} | NO_MORE),
    ],
)
def test_objects_that_declare_their_properties_have_no_others(schema: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert closed(schema) == wanted


def test_what_another_definition_is_applied_to_stays_open() -> None:
    """However many references lead there."""
    inner = {"type": "object", "properties": {"c": {"$ref": "#/$defs/C"}}}
    schema = {"allOf": [{"$ref": "#/$defs/B"}, {"required": ["z"]}], "$defs": {"B": inner, "C": A}}
    assert closed(schema) == schema


@settings(max_examples=400)
@given(schema=SCHEMAS, other=SCHEMAS, instance=INSTANCES)
def test_an_instance_of_the_closed_schema_is_one_of_the_open_one(
    schema: dict[str, Any], other: dict[str, Any], instance: Any
) -> None:
    assume('"$ref"' not in json.dumps(other))  # to itself
    whole = {**schema, "$defs": {"other": other}}
    open_ = jsonschema.Draft202012Validator(whole)
    if jsonschema.Draft202012Validator(closed(whole)).is_valid(instance):
        assert open_.is_valid(instance)
