"""`unevaluatedProperties` and `unevaluatedItems`: what no other keyword has looked at.

Which properties those are depends on the schemas that the instance happens to follow. So each way to follow them is
written out, with the names that it looks at; the instances of all ways together are those of the schema.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .negation import all_of, any_of, negated, one_alone
from .references import CannotRewrite, References, Schema

_MAX_WAYS = 64  # larger: more schemas can be kept, and each takes longer to compile
_MAX_BRANCHES = 4  # of an `anyOf`: any number of them may be followed at once
_MAX_DEPTH = 16  # of references and branches within one another
_NAMES = ("$schema", "$id", "$anchor", "$dynamicAnchor", "$defs", "definitions")
_APPLICATORS = ("allOf", "anyOf", "oneOf", "if", "then", "else", "dependentSchemas", "$ref")


@dataclass(slots=True, frozen=True)
class _Way:
    """One way to follow a schema: what then holds, and what has been looked at."""

    holds: tuple[Schema, ...] = ()
    names: frozenset[str] = frozenset()
    patterns: frozenset[str] = frozenset()
    all_properties: bool = False
    num_items: int = 0  # from the first on
    all_items: bool = False
    contained: tuple[Schema, ...] = ()  # items that are instances of one of these

    def __and__(self, other: _Way) -> _Way:
        return _Way(
            self.holds + other.holds,
            self.names | other.names,
            self.patterns | other.patterns,
            self.all_properties or other.all_properties,
            max(self.num_items, other.num_items),
            self.all_items or other.all_items,
            self.contained + other.contained,
        )


def without_unevaluated(schema: dict[str, object], references: References) -> Schema:
    """Return a schema of the same instances that says what is not evaluated otherwise. Raises CannotRewrite."""
    ways = any_of(all_of(way.holds) for way in _ways(schema, references, 0))
    names = {keyword: schema[keyword] for keyword in _NAMES if keyword in schema}
    return {**names, **ways} if isinstance(ways, dict) else ways


def _ways(schema: object, references: References, depth: int) -> list[_Way]:
    if depth > _MAX_DEPTH:
        raise CannotRewrite
    if not isinstance(schema, dict):
        return [_Way((schema,))] if schema is True else []
    if "$dynamicRef" in schema or (depth and "$id" in schema):  # what it names is another's
        raise CannotRewrite
    choices = itertools.chain(([_own(schema, references)],), _choices(schema, references, depth + 1))
    return [_closed(way, schema, references) for way in _together(choices)]


def _own(schema: dict[str, object], references: References) -> _Way:
    """Return what the schema says itself, without those that it applies to the same instance."""
    properties, patterns = schema.get("properties"), schema.get("patternProperties")
    contains = None if references.is_earlier_draft else schema.get("contains")
    has_places = isinstance(schema.get("items"), list)  # as earlier drafts have it
    first = schema.get("items" if has_places else "prefixItems")
    left_out = {*_NAMES, *_APPLICATORS, "unevaluatedProperties", "unevaluatedItems"}
    return _Way(
        holds=({keyword: value for keyword, value in schema.items() if keyword not in left_out},),
        names=frozenset(properties) if isinstance(properties, dict) else frozenset(),
        patterns=frozenset(patterns) if isinstance(patterns, dict) else frozenset(),
        all_properties="additionalProperties" in schema,
        num_items=len(first) if isinstance(first, list) else 0,
        all_items=("additionalItems" if has_places else "items") in schema,
        contained=(contains,) if isinstance(contains, dict | bool) else (),
    )


def _choices(schema: dict[str, object], references: References, depth: int) -> Iterator[list[_Way]]:
    """Yield, for each keyword that applies further schemas, the ways to follow it."""

    def ways(part: object) -> list[_Way]:
        return _ways(part, references, depth)

    if "$ref" in schema:
        yield ways(references.target(str(schema["$ref"])))
    for part in _list(schema, "allOf"):
        yield ways(part)
    if branches := _list(schema, "anyOf"):
        yield [way for chosen in _some_of(branches) for way in _together(map(ways, chosen))]
    if branches := _list(schema, "oneOf"):
        yield [
            replace(way, holds=way.holds + others)
            for branch, others in one_alone(branches, references)
            for way in ways(branch)
        ]
    if "if" in schema:
        refuted = _Way((negated(schema["if"], references),))
        yield [
            *_together([ways(schema["if"]), ways(schema.get("then", True))]),
            *_together([[refuted], ways(schema.get("else", True))]),
        ]
    dependent = schema.get("dependentSchemas")
    for name, part in dependent.items() if isinstance(dependent, dict) else ():
        absent = _Way(({"properties": {name: False}},))
        yield [absent, *_together([[_Way(({"type": "object", "required": [name]},))], ways(part)])]


def _some_of(branches: list[object]) -> Iterator[tuple[object, ...]]:
    if len(branches) > _MAX_BRANCHES:
        raise CannotRewrite
    return itertools.chain.from_iterable(
        itertools.combinations(branches, number) for number in range(1, len(branches) + 1)
    )


def _together(choices: Iterable[list[_Way]]) -> list[_Way]:
    """Return every way to make each choice once."""
    ways = [_Way()]
    for choice in choices:
        ways = [way & other for way in ways for other in choice]
        if len(ways) > _MAX_WAYS:
            raise CannotRewrite
    return ways


def _closed(way: _Way, schema: dict[str, object], references: References) -> _Way:
    """Return the way with the schema's own word on what has not been looked at."""
    properties, items = schema.get("unevaluatedProperties"), schema.get("unevaluatedItems")
    if isinstance(properties, dict | bool):
        if not way.all_properties:
            rest: Schema = {
                "properties": dict.fromkeys(sorted(way.names), True),
                "patternProperties": dict.fromkeys(sorted(way.patterns), True),
                "additionalProperties": properties,
            }
            way = replace(way, holds=(*way.holds, rest))
        way = replace(way, all_properties=True)
    if isinstance(items, dict | bool):
        if not way.all_items:
            rest = references.listed([True] * way.num_items, any_of([*way.contained, items]))
            way = replace(way, holds=(*way.holds, rest))
        way = replace(way, all_items=True)
    return way


def _list(schema: dict[str, object], keyword: str) -> list[object]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []
