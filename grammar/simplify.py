"""A JSON schema loses keywords that say nothing where they stand, or what another keyword says.

It has the same instances afterwards. What cannot be said in another way stays, and is refused.
"""

from __future__ import annotations

import re

from .limits import DATA, NAMED

_COUNTS = frozenset({"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"})
# Keywords by which other schemas evaluate properties or items of the same instance.
_APPLICATORS = frozenset(
    {"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "contains"}
)
_DRAFT = re.compile(r"https?://json-schema\.org/(?:(draft-0[4-7])/|(draft/20(?:19-09|20-12))/)?schema#?")
# Keyword -> the values with which it demands nothing.
_EMPTY: dict[str, tuple[object, ...]] = {
    "uniqueItems": (False,),
    "propertyNames": (True, {}),
    "not": (False,),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    # OpenAPI's and Pydantic's: how a text is shown or taken, or what bears its name. Of the text they demand nothing.
    "format": ("password", "binary", "path", "file-path", "directory-path"),
}
# Keyword -> those without any of which it is passed over, by the specification.
_NEEDS = {
    "if": ("then", "else"),
    "then": ("if",),
    "else": ("if",),
    "minContains": ("contains",),
    "maxContains": ("contains",),
}


def simplified(schema: object, *, is_dynamic: bool) -> object:
    """Return the schema without such keywords. `is_dynamic`: there is a `$dynamicRef` somewhere, with its anchors."""
    if isinstance(schema, list):
        return [simplified(part, is_dynamic=is_dynamic) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        keyword: _value(keyword, value, is_dynamic)
        for keyword, value in schema.items()
        if not _says_nothing(keyword, value, schema) and (is_dynamic or keyword != "$dynamicAnchor")
    }
    if isinstance(draft := kept.get("$schema"), str) and (named := _DRAFT.fullmatch(draft)) is not None:
        kept |= {"$schema": _canonical(named)}
    other_items = "additionalItems" if isinstance(kept.get("items"), list) else "items"
    for unevaluated, rest in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", other_items)):
        if unevaluated in kept and not _APPLICATORS & kept.keys():
            kept.setdefault(rest, kept.pop(unevaluated))  # what `rest` is about is evaluated
    return kept


def _canonical(draft: re.Match[str]) -> str:
    """Return the one name of a draft that the library knows: many write another scheme, or no draft for the latest."""
    if draft[1] is not None:
        return f"http://json-schema.org/{draft[1]}/schema#"
    return f"https://json-schema.org/{draft[2] or 'draft/2020-12'}/schema"


def _says_nothing(keyword: str, value: object, schema: dict[str, object]) -> bool:
    if any(type(value) is type(empty) and value == empty for empty in _EMPTY.get(keyword, ())):
        return True
    return keyword in _NEEDS and not any(other in schema for other in _NEEDS[keyword])


def _value(keyword: str, value: object, is_dynamic: bool) -> object:
    if keyword in _COUNTS and isinstance(value, float) and value.is_integer():
        return int(value)
    if keyword in DATA:
        return value
    if keyword in NAMED and isinstance(value, dict):
        return {name: simplified(part, is_dynamic=is_dynamic) for name, part in value.items()}
    return simplified(value, is_dynamic=is_dynamic)
