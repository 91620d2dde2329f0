"""The grammar of a call's arguments in Gemma 4's form, by their schema (`gemma_text.py` reads them).

    {"type": "object", "properties": {"city": {"enum": ["Oslo"]}, "days": {"type": "integer"}}, "required": ["city"]}
    ─>  "{" "city:" <|"|> "Oslo" <|"|> ("," "days:" integer)? "}"

An object's pairs stand by their names, as the model has learnt them of its template. What a schema says that cannot be
said here is an error: a grammar that left it away would let through what the schema does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]

_SILENT = {"title", "description", "default", "examples", "example", "deprecated"}  # what forbids nothing
_SILENT |= {"$schema", "$comment", "$defs", "definitions"}
_OF_TYPE = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength"},
    "number": (_RANGE := {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "integer": _RANGE,
    "boolean": set[str](),
    "null": set[str](),
}  # fmt: skip
_BARE = re.compile(r"[^\s:{}\[\],<>\"](?:[^:{}\[\],<>\"]{0,200}[^\s:{}\[\],<>\"])?")  # a key
_ANY_KEY = r"/[A-Za-z_][A-Za-z0-9_.\-]{0,63}:/"
_quoted = json.JSONEncoder(ensure_ascii=False).encode
_MAX_PARTS = 2000  # schemas in a schema, and values: the router waits some 10 us for each
_MAX_DEPTH = 100  # of schemas in schemas, references among them; Python allows some ten times as many calls


class ArgumentsGrammar:
    """Collects the rules of several tools' arguments. `mark`: around a text, in Lark; special: no text has it."""

    def __init__(self, mark: str, *, is_special: bool) -> None:
        self.mark = mark
        self._is_special = is_special
        self.bodies: dict[str, str] = {}  # of rules, by their names
        self._names: dict[str, str] = {}  # of rules, by their bodies
        self._lazy: set[str] = set()  # rules that end as soon as they may: texts before a mark that is a text, too

    @property
    def rules(self) -> list[str]:
        """Return the rules, in Lark."""
        return [f"{name}{'[lazy]' if name in self._lazy else ''}: {body}" for name, body in self.bodies.items()]

    def any_object(self) -> str:
        """Return the rule of any arguments."""
        if "any_object" not in self.bodies:
            self.bodies["any_object"] = f'"{{" ({_ANY_KEY} any_value ("," {_ANY_KEY} any_value)*)? "}}"'
            scalars = f'{self.text("*")} | {self.json({"type": "number"})} | "true" | "false" | "null"'
            self.bodies["any_value"] = f'{scalars} | "[" (any_value ("," any_value)*)? "]" | any_object'
        return "any_object"

    def of_schema(self, schema: Schema) -> str:
        """Return the rule of arguments that follow a schema. Raises ValueError for what cannot be said."""
        if not schema.keys() - _SILENT:
            return self.any_object()
        kept = dict(self.bodies), dict(self._names), set(self._lazy)
        try:
            return self.rule(_Reader(self, schema).value({"type": "object", **schema}, 0))
        except (TypeError, AttributeError, ValueError) as error:  # of the first two a part is of no type that it may be
            self.bodies, self._names, self._lazy = kept
            raise ValueError(f"a schema cannot be said: {error}") from error

    def rule(self, body: str) -> str:
        """Return the name of the rule with this body."""
        if body not in self._names:
            self._names[body] = self.new_name()
            self.bodies[self._names[body]] = body
        return self._names[body]

    def new_name(self) -> str:
        """Return a name for a rule whose body is to come."""
        name = f"part_{len(self.bodies)}"
        self.bodies[name] = ""
        return name

    def json(self, schema: Schema) -> str:
        """Return the rule of what is the same in JSON."""
        return self.rule(f"%json {json.dumps(schema)}")

    def text(self, times: str) -> str:
        """Return a text between marks, of so many characters."""
        body = rf"/(.|\n){times}/ {self.mark}"
        if not self._is_special:
            body = self.rule(body)
            self._lazy.add(body)
        return f"{self.mark} {body}"


class _Reader:
    """Reads one tool's schema."""

    def __init__(self, grammar: ArgumentsGrammar, root: Schema) -> None:
        self._grammar, self._root = grammar, root
        self._num_parts = 0
        self._referred: dict[str, str] = {}  # rules by references to them: one may refer to itself

    def value(self, schema: object, depth: int) -> str:
        """Return what follows a schema, as a part of a rule."""
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deep")  # or without end, by references
        self._count(1)
        if schema is True:
            schema = {}
        if not isinstance(schema, Mapping):
            raise ValueError("no schema")
        told = {key: value for key, value in schema.items() if key not in _SILENT}
        match told:
            case {"$ref": str(reference), **others} if not others:
                return self._reference(reference, depth)
            case {"anyOf": list(options), **others} if options and not others:
                return _either(self.value(option, depth + 1) for option in options)
            case {"const": value, **others} if not others.keys() - {"type"}:
                return self._literals([value], others)
            case {"enum": list(values), **others} if not others.keys() - {"type"}:
                return self._literals(values, others)
            case {"type": list(told_kinds), **others} if told_kinds:
                kinds = list(dict.fromkeys(told_kinds))
                self._check(others, kinds)
                each = ({key: others[key] for key in others.keys() & _OF_TYPE[kind]} | {"type": kind} for kind in kinds)
                return _either(self.value(one, depth + 1) for one in each)
            case {"type": str(kind), **others}:
                self._check(others, [kind])
                return self._typed(kind, others, depth)
            case {"properties": _} if "type" not in told:
                return self.value({"type": "object", **told}, depth)
        if told:
            raise ValueError(f"{', '.join(told)} cannot be said")
        self._grammar.any_object()
        return "any_value"

    def _count(self, num_parts: int) -> None:
        self._num_parts += num_parts
        if self._num_parts > _MAX_PARTS:
            raise ValueError(f"more than {_MAX_PARTS} parts")

    def _reference(self, reference: str, depth: int) -> str:
        if reference not in self._referred:
            name = self._referred[reference] = self._grammar.new_name()
            self._grammar.bodies[name] = self.value(self._found(reference), depth + 1)
        return self._referred[reference]

    def _check(self, told: Schema, kinds: Sequence[str]) -> None:
        known = [_OF_TYPE[kind] for kind in kinds if kind in _OF_TYPE]
        if len(known) < len(kinds) or (unknown := told.keys() - set[str]().union(*known)):
            raise ValueError(f"{', '.join(kinds if len(known) < len(kinds) else unknown)} cannot be said")

    def _typed(self, kind: str, told: Schema, depth: int) -> str:
        match kind:
            case "object":
                return self._object(told, depth)
            case "array":
                item = self._grammar.rule(self.value(told.get("items", True), depth + 1))
                return f'"[" {_repeated(item, *_bounds(told, "Items"))} "]"'
            case "string":
                return self._grammar.text(_times(*_bounds(told, "Length")) if told else "*")
        return self._grammar.json({"type": kind, **told})

    def _object(self, told: Schema, depth: int) -> str:
        properties, required = told.get("properties", {}), set(told.get("required", ()))
        others = told.get("additionalProperties", not properties)
        if not isinstance(properties, Mapping) or required - properties.keys() or (properties and others is not False):
            raise ValueError("properties that are not named cannot be said")
        if not properties and others is False:
            return '"{" "}"'
        if not properties:
            value = self._grammar.rule(self.value(others, depth + 1))
            return f'"{{" ({_ANY_KEY} {value} ("," {_ANY_KEY} {value})*)? "}}"'
        names = sorted(properties, key=str.lower)
        if wrong := [name for name in names if _BARE.fullmatch(name) is None]:
            raise ValueError(f"{wrong[0]!r} is no bare key")
        values = [self._grammar.rule(self.value(properties[name], depth + 1)) for name in names]
        pairs = [f"{_quoted(f'{name}:')} {value}" for name, value in zip(names, values, strict=True)]
        return f'"{{" {self._pairs(pairs, [name in required for name in names])} "}}"'

    def _pairs(self, pairs: Sequence[str], are_required: Sequence[bool]) -> str:
        """Return pairs in their order, with commas between those that there are."""
        starts, rest = list[str](), ""  # what begins with each pair, the last one first; what may stand behind it
        for pair, is_required in zip(reversed(pairs), reversed(are_required), strict=True):
            if is_required:
                starts.clear()
            starts.append(f"{pair} {rest}")
            rest = self._grammar.rule(f'"," {pair} {rest}' if is_required else f'("," {pair})? {rest}')
        return f"({' | '.join(reversed(starts))}){'' if any(are_required) else '?'}"

    def _literals(self, values: Sequence[object], told: Schema) -> str:
        self._count(len(values))
        told_kinds = told.get("type", [*_OF_TYPE])
        kinds = {told_kinds} if isinstance(told_kinds, str) else {*told_kinds}
        fitting = [value for value in values if _kinds_of(value) & kinds]
        if not fitting:
            raise ValueError("no value is of its type")
        return _either(map(self._literal, fitting))

    def _literal(self, value: object) -> str:
        match value:
            case str():
                return f"{self._grammar.mark} {_quoted(value) if value else ''} {self._grammar.mark}"
            case bool() | int() | float() | None:
                return _quoted(json.dumps(value))
        raise ValueError("a list or an object among few values cannot be said")

    def _found(self, reference: str) -> object:
        if reference != "#" and not reference.startswith("#/"):
            raise ValueError(f"{reference} is in another schema")
        found: object = self._root
        for key in reference.split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or key not in found:
                raise ValueError(f"{reference} is nowhere")
            found = found[key]
        return found


def _kinds_of(value: object) -> set[str]:
    match value:
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number"}
        case str():
            return {"string"}
    return {"null"} if value is None else {"object", "array"}


def _either(parts: Iterator[str] | map[str]) -> str:
    return f"({' | '.join(dict.fromkeys(parts))})"


def _bounds(told: Schema, of: str) -> tuple[int, int | None]:
    least, most = told.get(f"min{of}", 0), told.get(f"max{of}")
    if (
        not isinstance(least, int)
        or not isinstance(most, int | None)
        or least < 0
        or (most is not None and most < least)
    ):
        raise ValueError(f"min{of} and max{of} are no bounds")
    return least, most


def _times(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}"


def _repeated(item: str, least: int, most: int | None) -> str:
    if most == 0:
        return ""
    more = _times(max(0, least - 1), None if most is None else most - 1)
    return f'({item} ("," {item}){more}){"" if least else "?"}'
