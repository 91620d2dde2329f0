"""The opposite of a JSON schema, in keywords that the library keeps.

`negated(S)` has exactly the instances that S has not, but that no number stands for one that must not be whole, and an
item that must break a schema is among the first MAX_PLACES. What has no such opposite raises CannotRewrite.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

from .kept_numbers import holds_none
from .references import CannotRewrite, References, Schema

TYPES = ("null", "boolean", "number", "string", "array", "object")
# Keywords that say nothing about instances.
NOTES = frozenset(
    "title description default examples example deprecated readOnly writeOnly $comment $schema $id $anchor"
    " $dynamicAnchor $defs definitions $vocabulary format contentEncoding contentMediaType contentSchema".split()
)
# Bound -> (types that it is about, the keyword of the opposite bound, what to add to its value).
_BOUNDS = {
    "minimum": ("number", "exclusiveMaximum", 0),
    "maximum": ("number", "exclusiveMinimum", 0),
    "exclusiveMinimum": ("number", "maximum", 0),
    "exclusiveMaximum": ("number", "minimum", 0),
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
    "minProperties": ("object", "maxProperties", -1),
    "maxProperties": ("object", "minProperties", 1),
}
MAX_PLACES = 8  # where an item is looked for. Larger: also later in a list, and its schema is written as often
_MAX_DEPTH = 32  # of references within references: one that meets itself ends here


def negated(schema: object, references: References, depth: int = 0) -> Schema:
    """Return the opposite. Raises CannotRewrite."""
    if depth > _MAX_DEPTH:
        raise CannotRewrite
    if isinstance(schema, bool):
        return not schema
    if not isinstance(schema, dict):
        raise CannotRewrite
    return any_of([negation for keyword in schema for negation in _negations(keyword, schema, references, depth + 1)])


def one_alone(branches: Sequence[object], references: References) -> list[tuple[object, tuple[Schema, ...]]]:
    """Return each branch with the opposites of all others. Raises CannotRewrite."""
    opposites = [negated(branch, references) for branch in branches]
    return [(branch, (*opposites[:place], *opposites[place + 1 :])) for place, branch in enumerate(branches)]


def any_of(schemas: Iterable[Schema]) -> Schema:
    """Return a schema for the instances of any of these."""
    kept = [schema for schema in schemas if schema is not False]
    if any(schema is True or schema == {} for schema in kept):
        return True
    if len(kept) < 2:
        return kept[0] if kept else False
    return {"anyOf": kept}


def all_of(schemas: Iterable[Schema]) -> Schema:
    """Return a schema for the instances that all of these have."""
    kept = [schema for schema in schemas if schema is not True and schema != {}]
    if any(schema is False for schema in kept):
        return False
    if len(kept) < 2:
        return kept[0] if kept else True
    return {"allOf": kept}


def other_types(*types: str) -> Schema:
    """Return a schema for values of every type but these. Numbers are one type here."""
    return {"type": [name for name in TYPES if name not in types]}


def _negations(keyword: str, schema: dict[str, object], references: References, depth: int) -> Iterator[Schema]:
    """Yield schemas whose instances together are those that break this keyword."""
    value = schema[keyword]
    if keyword in NOTES:
        return

    def opposite(part: object) -> Schema:
        return negated(part, references, depth)

    match keyword, value:
        case "type", str() | list():
            yield _not_of_type([value] if isinstance(value, str) else value)
        case "const", _:
            yield from _not_among([value])
        case "enum", list():
            yield from _not_among(value)
        case "required", list() if all(isinstance(name, str) for name in value):
            for name in value:
                yield {"type": "object", "properties": {name: False}}
        case "properties", dict():
            for name, part in value.items():
                yield {"type": "object", "required": [name], "properties": {name: opposite(part)}}
        case "not", _:
            yield cast(Schema, value)
        case "anyOf", list():
            yield all_of(map(opposite, value))
        case "allOf", list():
            yield any_of(map(opposite, value))
        case "oneOf", list():
            yield from _not_one(value, opposite)
        case "prefixItems", list():
            for place, part in enumerate(value):
                yield _item(opposite(part), place, references)
        case "items", dict() | bool():
            first = len(prefix) if isinstance(prefix := schema.get("prefixItems"), list) else 0
            for place in range(first, first + MAX_PLACES):
                yield _item(opposite(value), place, references)
        case "contains", dict() | bool() if not {"minContains", "maxContains"} & schema.keys():
            yield {"type": "array", "items": opposite(value)}
        case "$ref", str():
            yield opposite(references.target(value))
        case _, int() | float() if keyword in _BOUNDS:
            about, other, more = _BOUNDS[keyword]
            if not (more == -1 and value <= 0):  # every count is at least zero
                yield {"type": about, other: value + more}
        case _:
            raise CannotRewrite


def _item(schema: Schema, place: int, references: References) -> Schema:
    """Lists with an item like this at a place."""
    if schema is False:
        return False
    return {"type": "array", **references.listed([*[True] * place, schema]), "minItems": place + 1}


def _not_of_type(types: Sequence[object]) -> Schema:
    names = {"number" if name == "integer" else str(name) for name in types}
    return other_types(*names) if names < set(TYPES) else False


def _not_one(schemas: list[object], opposite: Callable[[object], Schema]) -> Iterator[Schema]:
    """None of them, or two."""
    yield all_of(map(opposite, schemas))
    for index, first in enumerate(schemas):
        for second in schemas[index + 1 :]:
            yield all_of([cast(Schema, first), cast(Schema, second)])


# --- values -----------------------------------------------------------------------------------------------------


def _not_among(values: Sequence[object]) -> Iterator[Schema]:
    """Yield schemas for every value but these. Raises CannotRewrite for lists and objects that are not empty."""
    strings = sorted({value for value in values if isinstance(value, str)})
    numbers = sorted({value for value in values if isinstance(value, int | float) and not isinstance(value, bool)})
    truths = {value for value in values if isinstance(value, bool)}
    given = {
        "null": None in values,
        "boolean": bool(truths),
        "number": bool(numbers),
        "string": bool(strings),
        "array": any(isinstance(value, list) for value in values),
        "object": any(isinstance(value, dict) for value in values),
    }
    if any(isinstance(value, list | dict) and value for value in values):
        raise CannotRewrite
    yield other_types(*(name for name, is_given in given.items() if is_given))
    if strings:
        yield {"type": "string", "pattern": pattern_of_others(strings)}
    yield from _other_numbers(numbers)
    if len(truths) == 1:
        yield {"const": not truths.pop()}
    if given["array"]:
        yield {"type": "array", "minItems": 1}
    if given["object"]:
        yield {"type": "object", "minProperties": 1}


def _other_numbers(numbers: Sequence[int | float]) -> Iterator[Schema]:
    """Yield the open intervals around and between them."""
    if not numbers:
        return
    yield {"type": "number", "exclusiveMaximum": numbers[0]}
    for low, high in itertools.pairwise(numbers):
        between: dict[str, object] = {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high}
        if not holds_none(between):
            yield between
    yield {"type": "number", "exclusiveMinimum": numbers[-1]}


def pattern_of_others(words: Sequence[str]) -> str:
    """Return a regular expression of every string but these: they leave a tree of their letters, at any place."""
    return f"^(?:{_others(words)})$"


def _others(words: Sequence[str]) -> str:
    by_letter: dict[str, list[str]] = {}
    for word in words:
        if word:
            by_letter.setdefault(word[0], []).append(word[1:])
    ways = [] if "" in words else [""]
    letters = "".join(map(_in_class, by_letter))
    ways.append(rf"[^{letters}][\s\S]*" if letters else r"[\s\S]+")
    ways += [f"{re.escape(letter)}(?:{_others(rest)})" for letter, rest in by_letter.items()]
    return "|".join(ways)


def _in_class(letter: str) -> str:
    return f"\\{letter}" if letter in r"\]^-[&~" else letter
