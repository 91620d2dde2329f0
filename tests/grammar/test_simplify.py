"""Schemas lose keywords that say nothing where they stand, and no other: their instances are the same."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from kvferry.grammar.simplify import simplified

INSTANCES: list[Any] = [
    None, 1, 2.5, "", "abc", [], [1], [1, 1], ["a", 2, 3], {}, {"a": 1}, {"b": 1}, {"a": 1, "b": "x"}, {"c": [1, 1]},
]  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        ({"uniqueItems": False}, {}),
        ({"uniqueItems": True}, {"uniqueItems": True}),
        ({"format": "password", "type": "string"}, {"type": "string"}),
        ({"properties": {"format": {"format": "path"}}}, {"properties": {"format": {}}}),
        ({"format": "date"}, None),
        ({"if": {"type": "object"}}, {}),
        ({"then": {"type": "object"}, "else": False}, {}),
        ({"if": {"type": "object"}, "then": {"required": ["a"]}}, None),
        ({"minContains": 2, "maxContains": 3}, {}),
        ({"contains": {}, "minContains": 2}, None),
        ({"maxItems": 2.0, "minLength": 1.0}, {"maxItems": 2, "minLength": 1}),
        ({"properties": {"if": {"uniqueItems": False}}}, {"properties": {"if": {}}}),
        ({"enum": [{"if": 1}], "const": {"then": 2}}, None),
        (
            {"properties": {"a": {}}, "unevaluatedProperties": False},
            {"properties": {"a": {}}, "additionalProperties": False},
        ),
        (
            {"additionalProperties": {"type": "string"}, "unevaluatedProperties": False},
            {"additionalProperties": {"type": "string"}},
        ),
        ({"allOf": [{"properties": {"a": {}}}], "unevaluatedProperties": False}, None),
        ({"prefixItems": [{}], "unevaluatedItems": False}, {"prefixItems": [{}], "items": False}),
        ({"contains": {"type": "string"}, "unevaluatedItems": False}, None),
        ({"allOf": [{"unevaluatedItems": True}], "propertyNames": {}}, {"allOf": [{}]}),
        ({"not": False, "dependentRequired": {}}, {}),
        ({"not": True}, None),
        ({"$dynamicAnchor": "x", "type": "array"}, {"type": "array"}),
    ],
)
def test_what_says_nothing_goes(schema: dict[str, Any], wanted: dict[str, Any] | None) -> None:
    found = simplified(schema, is_dynamic=False)
    assert json.dumps(found) == json.dumps(schema if wanted is None else wanted)
    assert isinstance(found, dict)
    for instance in INSTANCES:
        verdicts = [jsonschema.Draft202012Validator(each).is_valid(instance) for each in (schema, found)]
        assert verdicts[0] == verdicts[1], instance


def test_anchors_stay_where_something_refers_to_them() -> None:
    schema = {"$dynamicAnchor": "x", "items": {"$dynamicRef": "#x"}}
    assert simplified(schema, is_dynamic=True) == schema


@pytest.mark.parametrize(
    ("written", "known"),
    [
        ("https://json-schema.org/draft-07/schema#", "http://json-schema.org/draft-07/schema#"),
        ("http://json-schema.org/draft-04/schema", "http://json-schema.org/draft-04/schema#"),
        ("http://json-schema.org/draft/2019-09/schema#", "https://json-schema.org/draft/2019-09/schema"),
        ("http://json-schema.org/schema#", "https://json-schema.org/draft/2020-12/schema"),
        ("https://spec.openapis.org/oas/3.1/dialect/base", "https://spec.openapis.org/oas/3.1/dialect/base"),
    ],
)
def test_a_draft_has_the_name_that_the_library_knows(written: str, known: str) -> None:
    given = {"$schema": written, "properties": {"$schema": {"const": written}}}
    assert simplified(given, is_dynamic=False) == {"$schema": known, "properties": {"$schema": {"const": written}}}
