"""Schemas in other words: what follows the new one follows the given one."""

from __future__ import annotations

import copy
import itertools
import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.grammar.formats import PATTERNS
from kvferry.grammar.negation import negated, pattern_of_others
from kvferry.grammar.references import CannotRewrite, References
from kvferry.grammar.rewriting import rewritten
from kvferry.grammar.simplify import simplified
from kvferry.tests.grammar.schema_strategies import INSTANCES, SCHEMAS


def _follows(schema: object, instance: object) -> bool:
    validator = jsonschema.Draft202012Validator(schema)
    verdict: bool = validator.is_valid(instance)
    return verdict


def _with_definition(schema: dict[str, Any], other: object) -> dict[str, Any]:
    return {**schema, "$defs": {"other": other}}


OTHERS = st.sampled_from([True, {"type": "string"}, {"properties": {"a": {"const": 1}}}, {"required": ["b"]}])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(SCHEMAS, OTHERS, st.lists(INSTANCES, min_size=1, max_size=12), st.booleans())
def test_what_follows_the_new_schema_follows_the_given_one(
    schema: dict[str, Any], other: object, instances: list[object], splits_one_of: bool
) -> None:
    schema = _with_definition(schema, other)
    before = copy.deepcopy(schema)
    new = simplified(rewritten(schema, splits_one_of=splits_one_of), is_dynamic=True)
    assert schema == before
    for instance in instances:
        if _follows(new, instance):
            assert _follows(schema, instance), (new, instance)


@pytest.mark.parametrize(
    "schema",
    [
        {"if": {"contains": {"type": "object", "required": []}, "maxContains": 2, "minContains": 0}, "then": False},
        {"oneOf": [{"contains": {"type": "object"}, "maxContains": 2}, {"minItems": 3}]},
    ],
)
def test_fewer_instances_of_a_part_are_not_more_of_the_whole(schema: dict[str, Any]) -> None:
    new = rewritten(schema, splits_one_of=False)
    assert not _follows(schema, [{}, None, {}]) and not _follows(new, [{}, None, {}])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(SCHEMAS, OTHERS, st.lists(INSTANCES, min_size=1, max_size=12))
def test_the_opposite_has_the_other_instances(schema: dict[str, Any], other: object, instances: list[object]) -> None:
    """Instances have no lists beyond the places that are looked at, and whole numbers alone."""
    schema = _with_definition(schema, other)
    try:
        opposite = negated(schema, References(schema))
    except CannotRewrite:
        return
    if isinstance(opposite, dict):
        opposite = _with_definition(opposite, other)
    for instance in instances:
        assert _follows(opposite, instance) != _follows(schema, instance), (opposite, instance)


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        (
            {
                "type": "object",
                "properties": {"country": {"enum": ["US", "NL"]}, "code": {"type": "string"}},
                "if": {"properties": {"country": {"const": "US"}}, "required": ["country"]},
                "then": {"properties": {"code": {"pattern": "^[0-9]{5}$"}}},
                "else": {"properties": {"code": {"pattern": "^[A-Z]{2}$"}}},
            },
            [{"country": "US", "code": "12345"}, {"country": "NL", "code": "AB"}, {"code": "AB"}, {"country": "US"}],
            [{"country": "US", "code": "AB"}, {"country": "NL", "code": "12345"}, {"code": "12345"}],
        ),
        (
            {"dependentRequired": {"card": ["address"]}},
            [{}, {"address": 1}, {"card": 1, "address": 2}],
            [{"card": 1}],
        ),
        (
            {"not": {"enum": ["red", "rest", ""]}, "type": "string"},
            ["r", "re", "reds", "blue", "R", "res\nt"],
            ["red", "rest", ""],
        ),
        (
            {"contains": {"const": 3}, "minContains": 2, "items": {"type": "integer"}},
            [[3, 3], [1, 3, 3], [1, 2, 3, 3, 4]],
            [[], [3], [1, 2, 3]],
        ),
        (
            {"contains": {"const": 3}, "maxContains": 1, "items": {"type": "integer"}},
            [[3], [1, 3], [1, 3, 2]],
            [[], [1], [3, 3], [3, 1, 3]],
        ),
        (
            {
                "allOf": [{"properties": {"a": True}}, {"patternProperties": {"^x": {"type": "integer"}}}],
                "anyOf": [{"required": ["b"], "properties": {"b": True}}, {"properties": {"c": {"const": 1}}}],
                "unevaluatedProperties": False,
            },
            [{"a": 1, "b": 2}, {"a": 1, "c": 1}, {"b": 1, "c": 1}, {"x1": 3}],
            [{"d": 1}, {"b": 1, "c": 2}, {"x1": "y"}],
        ),
        (
            {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "dependencies": {"a": ["b"], "c": {"properties": {"a": {"const": 1}}}},
            },
            [{}, {"b": 1}, {"a": 1, "b": 2}, {"c": 0}, {"c": 0, "a": 1, "b": 2}, 3],
            [{"a": 1}, {"c": 0, "a": 2, "b": 2}, {"c": 0, "a": 1}],
        ),
        (
            {"uniqueItems": True, "items": {"enum": [1, 1.0, True, None]}},
            [[], [1], [1, True], [None, True, 1], 3],
            [[1, 1], [1, 1.0], [None, 1, None], ["a"]],
        ),
        (
            {"uniqueItems": True, "maxItems": 2, "items": {"enum": list("abcde")}},
            [[], ["e"], ["e", "a"]],
            [["e", "e"], ["a", "b", "c"]],
        ),
        ({"uniqueItems": True, "items": {"type": "boolean"}}, [[], [True, False]], [[True, True], [1]]),
        (
            {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
            [{"a": 1}, {"b": 1, "c": 2}],
            [{}, {"a": 1, "b": 2}, 1],
        ),
        (
            {"propertyNames": {"$ref": "#/$defs/color"}, "$defs": {"color": {"enum": ["red", "blue", 3], "title": ""}}},
            [{}, {"red": 1}, {"blue": 1, "red": 2}, [], "green"],
            [{"green": 1}, {"red": 1, "3": 2}],
        ),
        ({"propertyNames": {"type": "string", "description": "a word"}}, [{}, {"a": 1}], []),
        ({"propertyNames": {"minLength": 1, "maxLength": 2}}, [{}, {"a": 1, "bc": 2}, 3], [{"": 1}, {"abc": 1}]),
        ({"propertyNames": {"const": 3}}, [{}, 3], [{"3": 1}]),
        ({"format": "json-pointer", "type": "string"}, ["", "/a/b~0c"], ["a", "/~2"]),
        ({"format": "base64", "type": "string"}, ["", "YQ==", "YWJj", "YW/+"], ["YQ=", "YQ", "Y_-Q"]),
        ({"format": "base64url", "type": "string"}, ["YQ==", "Y_-Q"], ["YW/+"]),
        ({"format": "nanoid", "type": "string"}, ["V1StGXR8_Z5jdHi6B-myT"], ["", "V1StGXR8 Z5jdHi6B-myT"]),
        ({"format": "cidrv4", "type": "string"}, ["10.0.0.0/8", "255.1.2.99/32"], ["10.0.0.0", "1.2.3.4/33"]),
        ({"minimum": -(2**63), "exclusiveMaximum": 2.0**64}, [-(10**18), 0, 10**17], [-(2**64), 2**64]),
        (
            {"items": {"$dynamicRef": "#part"}, "$defs": {"x": {"$dynamicAnchor": "part", "type": "string"}}},
            [[], ["a"]],
            [[1]],
        ),
    ],
)
def test_in_other_words_it_has_the_same_instances(schema: dict[str, Any], valid: list[Any], invalid: list[Any]) -> None:
    new = simplified(rewritten(schema, splits_one_of=True), is_dynamic=True)
    kept = json.dumps(new)
    for keyword in (
        *("if", "not", "oneOf", "contains", "propertyNames"),
        *("dependentRequired", "unevaluatedProperties", "$dynamicRef"),
    ):
        assert f'"{keyword}"' not in kept
    assert all(_follows(new, instance) for instance in valid)
    assert not any(_follows(new, instance) for instance in invalid)


@pytest.mark.parametrize(
    "schema",
    [
        {"uniqueItems": True},
        {"uniqueItems": True, "items": {"enum": list("abcde")}},
        {"uniqueItems": True, "items": {"enum": ["a", "b"]}, "prefixItems": [True]},
        {"uniqueItems": True, "items": {"enum": [["a"], "b"]}},
        {"uniqueItems": True, "items": {"$ref": "#/items"}},
        {"not": {"pattern": "a"}},
        {"oneOf": [{"pattern": "a"}, {"pattern": "b"}]},
        {"if": {"multipleOf": 3}, "then": {"minimum": 5}},
        {"propertyNames": {"maxLength": 3, "pattern": "^a"}},
        {"propertyNames": {"format": "uuid"}},
        {"propertyNames": {"$ref": "#/propertyNames"}},
        {"contains": {"type": "string"}, "minContains": 1000},
        {"not": {"$ref": "https://example.com/other"}},
        {"dependentRequired": 3},
        {"not": {"required": [[1]]}},
        {"not": {"required": ["a", {}]}},
        {"dependencies": 3},
        {"format": "regex"},
    ],
)
def test_what_cannot_be_said_in_another_way_stays(schema: dict[str, Any]) -> None:
    assert rewritten(schema, splits_one_of=True) == schema


@pytest.mark.parametrize(
    ("parts", "most", "around"),
    [
        (["a", ".", "'", "-"], 5, "{}@b-.c.de"),
        (["1W", "2Y", "3M", "4D", "T", "5H", "6,7S", "8S", "."], 5, "P{}"),
        (["a@", "b.", "c", "..", "@"], 5, "{}d"),
    ],
)
def test_a_published_pattern_takes_the_same_texts_without_looking_around(
    parts: list[str], most: int, around: str
) -> None:
    words = ["".join(chosen) for count in range(most + 1) for chosen in itertools.product(parts, repeat=count)]
    for given_pattern, other in PATTERNS.items():
        assert "(?=" not in other and "(?!" not in other
        for word in words:
            text = around.format(word)
            assert bool(re.search(given_pattern, text)) == bool(re.search(other, text)), text


@pytest.mark.slow
@given(st.lists(st.text(max_size=4), min_size=1, max_size=5), st.text(max_size=5))
def test_the_pattern_of_other_words_has_every_other_word(words: list[str], word: str) -> None:
    schema = {"type": "string", "pattern": pattern_of_others(words).removesuffix("$") + r"\Z"}
    assert _follows(schema, word) == (word not in words)
    assert not any(_follows(schema, each) for each in words)
