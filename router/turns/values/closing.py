"""Schemas mean the properties that they declare and no others, where they do not say so.

Left to itself, a model may go on inventing properties that nobody declared, until its tokens are used up. An answer of
the closed schema is one of the open one, too: objects are closed only where nothing else looks at them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_LABELS = frozenset({"title", "description", "default", "examples", "example", "deprecated", "$comment", "$schema"})
_DATA = frozenset({"enum", "const", *_LABELS})
_DEFINITIONS = ("$defs", "definitions")
# A schema with no other keywords means its properties and no others.
_PLAIN = frozenset({"type", "properties", "required", *_DEFINITIONS, *_LABELS})
# Whatever is applied to an object, or to what is in it, besides its own declarations.
_BESIDE = frozenset(
    {
        *("allOf", "oneOf", "not", "if", "then", "else", "contains", "patternProperties", "propertyNames"),
        *("dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems", "additionalItems"),
    }
)
_OTHER_REFERENCES = frozenset({"$id", "id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef"})

Schema = Mapping[str, object]


def is_plain(schema: Schema) -> bool:
    """Tell whether a schema of an object declares properties, and says nothing of others."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list) or not schema.keys() <= _PLAIN:
        return False
    return schema.get("type", "object") == "object" and all(name in properties for name in required)


def closed(schema: Schema) -> Schema:
    """Return the schema with its plain objects closed; as it is where it is not clear what looks at which of them."""
    shared = set[str]()
    found = list(_references(schema, is_alone=True))
    while found:
        reference, is_alone = found.pop()
        if reference is None:
            return schema
        if is_alone or reference in shared:
            continue
        if (target := _definition(schema, reference)) is None:
            return schema
        shared.add(reference)
        found += _references(target, is_alone=False)
    made = _closed(schema, "#", shared)
    assert isinstance(made, Mapping)
    return made


def _definition(schema: Schema, reference: str) -> object:
    """Return what a reference to a definition leads to; None: it is another reference."""
    match reference.split("/"):
        case ["#", "$defs" | "definitions" as where, name]:
            definitions = schema.get(where)
            return definitions.get(name) if isinstance(definitions, Mapping) else None
    return None


def _parts(value: Schema) -> Iterator[tuple[str, object, bool]]:
    """Yield the places of a schema's parts, the parts, and whether nothing else looks at what each looks at."""
    has_more = "anyOf" in value and not value.keys() <= {"anyOf", "type", *_DEFINITIONS, *_LABELS}
    is_inner_alone = not has_more and not value.keys() & _BESIDE
    for keyword, part in value.items():
        if keyword in _DATA:
            continue
        if keyword in ("properties", *_DEFINITIONS) and isinstance(part, Mapping):
            for name, child in part.items():
                yield f"{keyword}/{name}", child, is_inner_alone or keyword in _DEFINITIONS
        elif keyword in ("anyOf", "prefixItems") and isinstance(part, list):
            for at, child in enumerate(part):
                yield f"{keyword}/{at}", child, is_inner_alone
        else:
            yield keyword, part, is_inner_alone and keyword in ("items", "additionalProperties")


def _references(value: object, *, is_alone: bool) -> Iterator[tuple[str | None, bool]]:
    """Yield each reference, and whether nothing else looks at what it looks at; None: one that is not understood."""
    if isinstance(value, list):
        for part in value:
            yield from _references(part, is_alone=False)
    elif isinstance(value, Mapping):
        if value.keys() & _OTHER_REFERENCES:
            yield None, False
        if isinstance(reference := value.get("$ref"), str):
            yield reference, is_alone and value.keys() <= {"$ref", *_LABELS}
        for _, part, is_part_alone in _parts(value):
            yield from _references(part, is_alone=is_alone and is_part_alone)


def _closed(value: object, place: str, shared: set[str]) -> object:
    if not isinstance(value, Mapping) or place in shared:
        return value
    made: dict[str, object] = dict(value)
    for where, part, is_alone in _parts(value):
        if not is_alone:
            continue
        keyword, _, name = where.partition("/")
        child = _closed(part, f"{place}/{where}", shared)
        if not name:
            made[keyword] = child
        elif isinstance(held := made[keyword], list):
            made[keyword] = [child if at == int(name) else each for at, each in enumerate(held)]
        elif isinstance(held, Mapping):
            made[keyword] = {**held, name: child}
    return made | {"additionalProperties": False} if is_plain(value) else made
