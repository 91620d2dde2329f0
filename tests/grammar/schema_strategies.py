"""Small schemas and instances that meet often."""

from __future__ import annotations

import operator
from typing import Any

from hypothesis import strategies as st

from kvferry.grammar.negation import TYPES

NAMES = st.sampled_from(["a", "b", "c"])
VALUES = st.sampled_from([None, True, False, 0, 1, 2, 7, "", "a", "ab", "b"])

INSTANCES = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)

_LEAVES = st.one_of(
    st.booleans(),
    st.builds(lambda value: {"const": value}, VALUES),
    st.sampled_from([{"pattern": "a"}, {"multipleOf": 2}, {"pattern": "b"}]),
    st.builds(lambda values: {"enum": values}, st.lists(VALUES, min_size=1, max_size=3, unique_by=repr)),
    st.builds(lambda name: {"type": name}, st.sampled_from(TYPES)),
    st.builds(lambda names: {"type": "object", "required": names}, st.lists(NAMES, max_size=2, unique=True)),
    st.builds(
        lambda keyword, value: {keyword: value},
        st.sampled_from(["minimum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems"]),
        st.integers(0, 3),
    ),
)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    some = st.lists(inner, min_size=1, max_size=3)
    named = st.dictionaries(NAMES, inner, max_size=2)
    values = {
        "properties": named,
        "additionalProperties": inner,
        "prefixItems": some,
        "items": inner,
        "anyOf": some,
        "allOf": some,
        "oneOf": some,
        "not": inner,
        "dependentSchemas": named,
        "dependentRequired": st.dictionaries(NAMES, st.lists(NAMES, max_size=2, unique=True), max_size=2),
        "propertyNames": st.sampled_from([True, False, {"pattern": "^a"}, {"enum": ["a", "b"]}, {"maxLength": 1}]),
        "unevaluatedProperties": st.booleans() | inner,
        "unevaluatedItems": st.booleans() | inner,
        "uniqueItems": st.booleans(),
        "$ref": st.just("#/$defs/other"),
    }
    counts = st.integers(0, 2)
    pairs = st.sampled_from(sorted(values)).flatmap(lambda keyword: st.tuples(st.just(keyword), values[keyword]))
    single = st.lists(pairs, min_size=1, max_size=3).map(dict)
    conditional = st.fixed_dictionaries({"if": inner}, optional={"then": inner, "else": inner})
    containing = st.fixed_dictionaries({"contains": inner}, optional={"minContains": counts, "maxContains": counts})
    return st.one_of(single, conditional, containing, st.builds(operator.or_, single, conditional | containing))


SCHEMAS = st.recursive(_LEAVES, _containers, max_leaves=8).filter(lambda schema: isinstance(schema, dict))
