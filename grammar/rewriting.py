"""A JSON schema in the keywords that the library keeps, where it has others.

    dependentRequired, dependentSchemas   the property is absent, or ...; `dependencies` of earlier drafts are either
    if, then, else                        if and then, or not if, and else
    not                                   the opposite (negation.py)
    oneOf                                 one, and the opposites of the others
    propertyNames                         properties or patternProperties, and no additional ones
    uniqueItems                           the orders of a few values, each once (unique_items.py)
    contains                              an item that fits among the first MAX_PLACES
    unevaluated...                        each way to follow the schema, written out (evaluated.py)
    $dynamicRef                           $ref, where a schema has no other resources
    format                                a pattern, or stricter formats (formats.py)
    pattern                               one that does not look around (formats.py)

The new schema has no instance that the given one has not: an answer that follows it is valid. It has all the others
too, but for `contains` at later places, stricter formats, and what negation.py leaves out. What cannot be said in
another way stays as it is, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import cast

from .evaluated import without_unevaluated
from .formats import FORMATS, PATTERNS
from .limits import DATA, NAMED
from .negation import MAX_PLACES, all_of, any_of, negated, one_alone, other_types
from .property_names import of_properties
from .references import CannotRewrite, References, Schema
from .unique_items import of_unique

_UNEVALUATED = frozenset({"unevaluatedProperties", "unevaluatedItems"})
_MAX_CONTAINED = 16  # items that `contains` counts
_MAX_DEPTH = 48  # of schemas that are written within one another
# Rewriting these keeps all instances.
_EXACT = frozenset({"dependentRequired", "dependentSchemas", "then", "else", "propertyNames", "uniqueItems"})
# Fewer instances of their schemas are more of the whole. They stay as given, as do branches of `oneOf` that would lose
# instances: two that overlapped might not any more.
_OPPOSED = frozenset({"if", "not"})


def rewritten(schema: object, *, splits_one_of: bool) -> object:
    """Return it in other words, as far as there are any. `splits_one_of`: the library cannot tell branches apart."""
    return _Rewriting(References(schema), splits_one_of).of(schema, 0)


class _Rewriting:
    def __init__(self, references: References, splits_one_of: bool) -> None:
        self._references = references
        self._num_narrowed = 0  # keywords whose other words may have fewer instances
        self._rules: dict[str, Callable[[dict[str, object]], Schema]] = {
            "dependentRequired": _dependent_required,
            "dependentSchemas": _dependent_schemas,
            "dependencies": _dependencies,
            "if": self._conditional,
            "then": _without_if,
            "else": _without_if,
            "not": lambda schema: negated(schema["not"], references),
            "propertyNames": lambda schema: of_properties(schema["propertyNames"], references),
            "contains": self._contains,
            "uniqueItems": lambda schema: of_unique(schema, references),
        }
        if splits_one_of:
            self._rules["oneOf"] = self._one_of

    def of(self, schema: object, depth: int) -> object:
        if isinstance(schema, list):
            return [self.of(part, depth) for part in schema]
        if not isinstance(schema, dict) or depth > _MAX_DEPTH:
            return schema
        schema = self._without_unevaluated(self._plain(schema))
        if not isinstance(schema, dict) or _UNEVALUATED & schema.keys():  # other words would be evaluated otherwise
            return schema
        kept, others = dict(schema), []
        for keyword, rule in self._rules.items():
            if keyword not in kept:
                continue
            try:
                others.append(rule(schema))
            except CannotRewrite:
                continue
            self._num_narrowed += keyword not in _EXACT
            for name in (keyword, *_BESIDE.get(keyword, ())):
                if isinstance(part := kept.pop(name, None), dict) and "$id" in part:  # it may be referred to
                    kept["$defs"] = {**cast("dict[str, object]", kept.get("$defs", {})), name: part}
        found = {keyword: self._value(keyword, value, depth) for keyword, value in kept.items()}
        if others := [other for other in others if other is not True]:
            given = found.get("allOf", [])
            found["allOf"] = [*(given if isinstance(given, list) else []), *self._each(others, depth)]
        return found

    def _each(self, schemas: Iterable[Schema], depth: int) -> Iterator[object]:
        return (self.of(schema, depth + 1) for schema in schemas)

    def _value(self, keyword: str, value: object, depth: int) -> object:
        if keyword in DATA or keyword in _OPPOSED:
            return value
        if keyword == "oneOf":
            num_narrowed = self._num_narrowed
            found = self.of(value, depth + 1)
            return found if self._num_narrowed == num_narrowed else value
        if keyword in NAMED and isinstance(value, dict):
            return {name: self.of(part, depth + 1) for name, part in value.items()}
        return self.of(value, depth + 1)

    def _plain(self, schema: dict[str, object]) -> dict[str, object]:
        """Return it without dynamic references, and with formats and patterns that the library knows."""
        plain = dict(schema)
        if "$ref" not in plain and str(plain.get("$dynamicRef")).startswith("#/"):
            plain["$ref"] = plain.pop("$dynamicRef")  # a path, not a name: it leads to one place
        if not self._references.is_dynamic:
            for dynamic, static in (("$dynamicRef", "$ref"), ("$dynamicAnchor", "$anchor")):
                if dynamic in plain and static not in plain:
                    plain[static] = plain.pop(dynamic)
        if (pattern := PATTERNS.get(str(plain.get("pattern")))) is not None:
            plain["pattern"] = pattern
        instead = FORMATS.get(str(plain.get("format")))
        if isinstance(instead, dict):
            self._num_narrowed += 1
            del plain["format"]
            plain["allOf"] = [*cast("list[object]", plain.get("allOf", [])), instead]
        return plain

    def _without_unevaluated(self, schema: dict[str, object]) -> Schema:
        if not _UNEVALUATED & schema.keys():
            return schema
        try:
            return without_unevaluated(schema, self._references)
        except CannotRewrite:
            return schema

    def _conditional(self, schema: dict[str, object]) -> Schema:
        condition = cast(Schema, schema["if"])
        then, otherwise = cast(Schema, schema.get("then", True)), cast(Schema, schema.get("else", True))
        if not {"then", "else"} & schema.keys():
            return True
        refuted = negated(condition, self._references)
        return any_of([all_of([condition, then]), all_of([refuted, otherwise])])

    def _one_of(self, schema: dict[str, object]) -> Schema:
        branches = one_alone(cast("list[object]", schema["oneOf"]), self._references)
        return any_of(all_of([cast(Schema, branch), *others]) for branch, others in branches)

    def _contains(self, schema: dict[str, object]) -> Schema:
        wanted = cast(Schema, schema["contains"])
        least, most = _count(schema, "minContains", 1), _count(schema, "maxContains", None)
        assert least is not None
        no_array = other_types("array")
        if most is None:
            if least == 0:
                return True
            some = [_places(True, place, wanted, least, True, self._references) for place in range(MAX_PLACES)]
            return any_of([no_array, *(some if wanted is not False else [])])
        other = negated(wanted, self._references)
        counts = range(least, min(most, _MAX_CONTAINED) + 1)
        return any_of(
            [
                no_array,
                *(
                    _places(other, place, wanted, count, other, self._references)
                    for count in counts
                    for place in (range(MAX_PLACES) if count else range(1))
                ),
            ]
        )


_BESIDE = {"if": ("then", "else"), "contains": ("minContains", "maxContains")}


def _without_if(schema: dict[str, object]) -> Schema:
    """Branches without a condition are passed over."""
    if "if" in schema:
        raise CannotRewrite
    return True


def _places(
    before: Schema, num_before: int, wanted: Schema, count: int, behind: Schema, references: References
) -> Schema:
    """Lists with so many items before `count` that are wanted, and any number behind them."""
    first = [before] * num_before + [wanted] * count
    return {"type": "array", "minItems": num_before + count, **references.listed(first, behind)}


def _count(schema: dict[str, object], keyword: str, default: int | None) -> int | None:
    value = schema.get(keyword, default)
    if value is None:
        return None
    if not isinstance(value, int | float) or value < 0 or (keyword == "minContains" and value > _MAX_CONTAINED):
        raise CannotRewrite
    return int(value)


def _dependent_required(schema: dict[str, object]) -> Schema:
    value = schema["dependentRequired"]
    if not isinstance(value, dict):
        raise CannotRewrite
    return all_of(any_of([{"properties": {name: False}}, {"required": others}]) for name, others in value.items())


def _dependent_schemas(schema: dict[str, object]) -> Schema:
    value = schema["dependentSchemas"]
    if not isinstance(value, dict):
        raise CannotRewrite
    return all_of(any_of([{"properties": {name: False}}, part]) for name, part in value.items())


def _dependencies(schema: dict[str, object]) -> Schema:
    value = schema["dependencies"]
    if not isinstance(value, dict):
        raise CannotRewrite
    required = {name: others for name, others in value.items() if isinstance(others, list)}
    schemas = {name: part for name, part in value.items() if name not in required}
    found = (_dependent_required({"dependentRequired": required}), _dependent_schemas({"dependentSchemas": schemas}))
    return all_of(found)
