"""Schemas mean the properties that they declare and no others, where they do not say so.

Left to itself, a model may go on inventing properties that nobody declared, until its tokens are used up. An answer of
the closed schema is one of the open one, too: objects are closed only where nothing else looks at them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_LABELS = frozenset({"title", "description", "default", "examples", "example", "deprecated", "$comment", "$schema"})
_DATA = frozenset({"enum", "const", *_LABELS})
_DEFINITIONS = ("$defs", "definitions")
_NAMED = ("properties", *_DEFINITIONS)  # their keys are no keywords
_LISTS = ("anyOf", "prefixItems")
_WALKED = frozenset({*_NAMED, *_LISTS, "items", "additionalProperties"})
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
    is_object = schema.get("type", "object") == "object"
    return is_object and all(isinstance(name, str) and name in properties for name in required)


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


def _is_alone(schema: Schema, keyword: str) -> bool:
    """Tell whether nothing else in the schema looks at what the keyword's parts look at."""
    if keyword in _DEFINITIONS:
        return True
    has_more = "anyOf" in schema and not schema.keys() <= {"anyOf", "type", *_DEFINITIONS, *_LABELS}
    return keyword in _WALKED and not has_more and not schema.keys() & _BESIDE


def _references(schema: object, *, is_alone: bool) -> Iterator[tuple[str | None, bool]]:
    """Yield each reference, and whether nothing else looks at what it looks at; None: one that is not understood."""
    waiting = [(schema, is_alone)]
    while waiting:
        value, is_alone = waiting.pop()
        if isinstance(value, list):
            waiting += [(part, False) for part in value]
        if not isinstance(value, Mapping):
            continue
        if value.keys() & _OTHER_REFERENCES:
            yield None, False
        if isinstance(reference := value.get("$ref"), str):
            yield reference, is_alone and value.keys() <= {"$ref", *_LABELS}
        for keyword, part in value.items():
            is_part_alone = is_alone and _is_alone(value, keyword)
            if keyword in _NAMED and isinstance(part, Mapping):
                waiting += [(child, is_part_alone) for child in part.values()]
            elif keyword in _LISTS and isinstance(part, list):
                waiting += [(child, is_part_alone) for child in part]
            elif keyword not in _DATA:
                waiting.append((part, is_part_alone))


def _closed(value: object, place: str, shared: set[str]) -> object:
    if not isinstance(value, Mapping) or place in shared:
        return value
    made: dict[str, object] = {}
    for keyword, part in value.items():
        where = f"{place}/{keyword}"
        if not _is_alone(value, keyword):
            made[keyword] = part
        elif keyword in _NAMED and isinstance(part, Mapping):
            made[keyword] = {name: _closed(child, f"{where}/{name}", shared) for name, child in part.items()}
        elif keyword in _LISTS and isinstance(part, list):
            made[keyword] = [_closed(child, f"{where}/{at}", shared) for at, child in enumerate(part)]
        else:
            made[keyword] = _closed(part, where, shared)
    return made | {"additionalProperties": False} if is_plain(value) else made
