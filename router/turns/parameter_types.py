"""The types of a tool's parameters, for forms of calls whose text alone does not say which a value is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from .syntax import Schemas
from .values.json_text import dumps, loads
from .values.python_text import literal

_TRUTH = {"true": True, "false": False, "null": None, "none": None}


def arguments_of(written: Sequence[str], end: str) -> str:
    """Return the object of these parameters; nothing before there is one, or its end."""
    return "{" + ", ".join(written) + end if written or end else ""


def typed(schemas: Schemas, tool: str, parameter: str, text: str) -> str:
    """Return a value as JSON: a string, unless the schema wants something else and the text is that."""
    kinds = parameter_kinds(schemas, tool, parameter)
    if kinds is None or kinds == {"string"}:
        return dumps(text)
    stripped = text.strip()
    is_word = stripped.lower() in _TRUTH
    value = _TRUTH[stripped.lower()] if is_word else _loads(stripped)
    if "string" in kinds:
        is_text = kinds_of(value).isdisjoint(kinds - {"string"})
    else:
        is_text = not kinds and isinstance(value, str)
    return dumps(text if is_text or (value is None and not is_word) else value)


def _loads(text: str) -> object:
    """Return the value that is JSON, or a list or an object as Python writes it; None: it is neither."""
    value = loads(text)
    if value is None and text.startswith(("[", "{")):
        with suppress(ValueError):
            return literal(text)
    return value


def parameter_kinds(schemas: Schemas, tool: str, parameter: str) -> set[str] | None:
    """Return the types that a tool's schema names for a parameter; empty: any; None: it does not know the parameter."""
    schema = properties_of(schemas, tool).get(parameter)
    return _kinds(schema) if isinstance(schema, dict) else None


def properties_of(schemas: Schemas, tool: str) -> Mapping[str, object]:
    """Return the parameters that a tool's schema declares."""
    properties = schemas.get(tool, {}).get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _kinds(schema: Mapping[str, object]) -> set[str]:
    """Return the types that a schema names, those of its alternatives too; empty: any."""
    kinds = schema.get("type")
    if isinstance(kinds, str | list):
        return {kinds} if isinstance(kinds, str) else {kind for kind in kinds if isinstance(kind, str)}
    members = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(members, list):
        return {kind for member in members for kind in kinds_of(member)}
    alternatives = schema.get("anyOf", schema.get("oneOf"))
    if not isinstance(alternatives, list):
        return set()
    named = [_kinds(each) if isinstance(each, dict) else set[str]() for each in alternatives]
    return set[str]().union(*named) if all(named) else set()


def kinds_of(value: object) -> set[str]:
    """Return the types that a value is of."""
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number", "integer"} if value.is_integer() else {"number"}
        case str():
            return {"string"}
        case list():
            return {"array"}
    return {"object"}
