"""Bounds of what a client may have compiled, looked at before the library sees it.

Five thousand properties take llguidance 19 s, and a counted repetition of 100,000 takes 30 ms for every mask, in which
no other answer of the step moves. What stays within these bounds is compiled in two seconds, or refused for time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from ..common.errors import RequestError
from ..common.grammar import MAX_GRAMMAR_BYTES, Grammar
from .source import SCHEMA_KINDS
from .tokens import TOKENS

MAX_DEPTH = 32  # of objects and arrays in a schema
MAX_PROPERTIES = 2_000  # in a schema, all objects together: the library takes about a second for as many
MAX_ENUM_MEMBERS = 2_000  # in a schema, or choices
MAX_PLACES = 4 * MAX_PROPERTIES  # of keywords that are kept for the text of a refusal
MAX_REPEATS = 2_048  # `{n}` in a regular expression or a grammar: a mask then takes a millisecond at most
_COUNTED = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")
# Objects whose keys are names of the client's, not keywords.
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
# Values that are data, not schemas.
DATA = frozenset({"enum", "const", "default", "examples", "example", "required", "x-guidance"})


@dataclass(slots=True)
class SchemaFacts:
    """`SchemaFacts` are what one walk over a schema finds."""

    num_properties: int = 0
    num_enum_members: int = 0
    places: dict[str, list[tuple[str, object]]] = field(default_factory=dict)  # of each keyword, with what it says
    num_places: int = 0
    patterns: list[tuple[str, str]] = field(default_factory=list)  # (path, regular expression)

    def place_of(self, keyword: str, reason: str) -> str | None:
        """Return the path of the keyword that a reason is about: it names what stands there, or something does."""
        places = self.places.get(keyword, [])
        words = ((path, value.removeprefix("#")) for path, value in places if isinstance(value, str))
        named = (path for path, word in words if word and word in reason)
        given = (path for path, value in places if value not in (False, None))
        return next(chain(named, given, (path for path, _ in places)), None)


def check_size(grammar: Grammar) -> SchemaFacts:
    """Return what a schema has, nothing for other kinds. Raises RequestError for what is beyond a bound.

    The errors' `param` is a path within the grammar: empty, or beginning with a dot.
    """
    facts = SchemaFacts()
    if len(grammar.text) > MAX_GRAMMAR_BYTES:
        raise refusal(f"has {len(grammar.text)} bytes; the limit is {MAX_GRAMMAR_BYTES}")
    if grammar.kind == TOKENS:
        return facts
    text = grammar.text.decode()
    if grammar.kind == "choice":
        _check_number(len(json.loads(text)), MAX_ENUM_MEMBERS, "choices")
    elif grammar.kind in ("regex", "lark"):
        _check_repeats(text, "")
    elif grammar.kind in SCHEMA_KINDS:
        facts = _facts_of(_parsed(text))
        _check_number(facts.num_properties, MAX_PROPERTIES, "properties")
        _check_number(facts.num_enum_members, MAX_ENUM_MEMBERS, "enum members")
        for path, pattern in facts.patterns:
            _check_repeats(pattern, path)
        if "x-guidance" in facts.places:  # it would have keywords passed over
            raise keyword_refusal("x-guidance", facts)
    return facts


def keyword_refusal(keyword: str, facts: SchemaFacts) -> RequestError:
    """Return the refusal of a keyword that cannot be kept."""
    path = facts.place_of(keyword, "") or f".{keyword}"
    return refusal(f"has the keyword '{keyword}' at '{path[1:]}', which is not supported", path)


def unkept_refusal(keyword: str, place: str, reason: str) -> RequestError:
    """Return the refusal of a keyword, at its place, that would not be kept as it is meant."""
    return refusal(f"has the keyword '{keyword}' at '{place[1:]}', which cannot be kept: {reason}", place)


def refusal(text: str, path: str = "") -> RequestError:
    """Return the refusal of a grammar for what it has at this path."""
    return RequestError(text, param=path, code="unsupported_grammar")


def _parsed(text: str) -> object:
    try:
        schema: object = json.loads(text)
    except RecursionError:
        raise refusal(f"is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise refusal(f"is not JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise refusal("must be an object or true")
    if schema is False:
        raise refusal("is false: there is no answer that could follow it")
    return schema


def _facts_of(schema: object) -> SchemaFacts:
    """Walk over the schemas in a schema, without recursion."""
    facts = SchemaFacts()
    waiting: list[tuple[object, str, int]] = [(schema, "", 1)]
    while waiting:
        value, path, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise refusal(f"is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, list):
            waiting += [(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
        elif isinstance(value, dict):
            waiting += _parts_of(value, path, depth, facts)
    return facts


def _parts_of(
    schema: dict[str, object], path: str, depth: int, facts: SchemaFacts
) -> Iterator[tuple[object, str, int]]:
    """Note a schema's keywords, and yield the values under them that are, or hold, schemas."""
    for keyword, value in schema.items():
        here = f"{path}.{keyword}"
        if facts.num_places < MAX_PLACES:
            facts.num_places += 1
            facts.places.setdefault(keyword, []).append((here, None if isinstance(value, dict | list) else value))
        if keyword == "enum" and isinstance(value, list):
            facts.num_enum_members += len(value)
        elif keyword == "pattern" and isinstance(value, str):
            facts.patterns.append((here, value))
        elif keyword in NAMED and isinstance(value, dict):
            facts.num_properties += len(value)
            if keyword == "patternProperties":
                facts.patterns += [(f"{here}.{name}", name) for name in value]
            for name, part in value.items():
                yield part, f"{here}.{name}", depth + 2
        if keyword not in DATA and keyword not in NAMED:
            yield value, here, depth + 1


def _check_number(number: int, most: int, what: str) -> None:
    if number > most:
        raise refusal(f"has {number} {what}; the limit is {most}")


def _check_repeats(pattern: str, path: str) -> None:
    for found in _COUNTED.finditer(pattern):
        if any(len(count) > 9 or int(count) > MAX_REPEATS for count in found.groups() if count):
            raise refusal(f"repeats a part {found[0]} times; the limit is {MAX_REPEATS}", path)
