"""`propertyNames` is said in keywords about the object's own properties."""

from __future__ import annotations

from .negation import NOTES
from .references import CannotRewrite, References, Schema

_MAX_REFERENCES = 16  # that lead to one another
_NOTES = NOTES - {"format"}  # which is a demand here


def of_properties(names: object, references: References) -> Schema:
    """Return a schema for the objects whose properties all have such names. Raises CannotRewrite.

    A few names are properties, not a pattern: each then comes once at most, and in an order that the library keeps.
    """
    demands = _demands(names, references)
    if demands is None:
        return {"maxProperties": 0}
    match sorted(demands):
        case []:
            return True
        case ["const"]:
            return _only([demands["const"]])
        case ["enum"] if isinstance(words := demands["enum"], list):
            return _only(words)
    return {"patternProperties": {_pattern(demands): True}, "additionalProperties": False}


def _demands(names: object, references: References) -> dict[str, object] | None:
    """Return the keywords that a name has to meet, as a string; None: there is no such name."""
    for _ in range(_MAX_REFERENCES):
        if isinstance(names, bool):
            return {} if names else None
        if not isinstance(names, dict):
            break
        demands = {keyword: value for keyword, value in names.items() if keyword not in _NOTES}
        if list(demands) != ["$ref"]:
            if demands.pop("type", "string") != "string":
                break
            return demands
        names = references.target(str(demands["$ref"]))
    raise CannotRewrite


def _only(words: list[object]) -> Schema:
    named = {word: True for word in words if isinstance(word, str)}
    return {"properties": named, "additionalProperties": False} if named else {"maxProperties": 0}


def _pattern(demands: dict[str, object]) -> str:
    """Return the regular expression of demands that have one together."""
    if isinstance(pattern := demands.get("pattern"), str) and len(demands) == 1:
        return pattern
    least, most = demands.get("minLength", 0), demands.get("maxLength", "")
    if demands.keys() <= {"minLength", "maxLength"} and isinstance(least, int | float):
        if isinstance(most, int | float):
            return rf"^[\s\S]{{{int(least)},{int(most)}}}$"
        return rf"^[\s\S]{{{int(least)},}}$"
    raise CannotRewrite
