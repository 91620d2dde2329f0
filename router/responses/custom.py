"""Custom tools of /v1/responses: functions with one argument, a text.

a tool of type custom ─> a function of {"input": ...}      a call of it ─> an item with the text itself
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic_core import from_json

from ...common.errors import RequestError
from ..bodies.fields import checked_string, unknown_field
from ..state.errors import shown

_INPUT = "input"
_PARAMETERS: Mapping[str, object] = {
    "type": "object",
    "properties": {_INPUT: {"type": "string"}},
    "required": [_INPUT],
    "additionalProperties": False,
}
_FIELDS = frozenset({"type", "name", "description", "format", "defer_loading"})
_UNTOLD = frozenset({"type", "defer_loading", "format"})
_OF_FUNCTIONS = ("parameters", "strict")


def custom_function(tool: Mapping[str, object], where: str, left_out: list[str]) -> dict[str, object]:
    """Return the function that the model is told of. Raises RequestError that names the place.

    A grammar of the text binds nothing: the text is a string of JSON here, whose letters are escaped. `left_out` gets
    its place.
    """
    match tool.get("format"):
        case None | {"type": "text"}:
            pass
        case {"type": "grammar"}:
            left_out.append(f"{where}.format")
        case other:
            rule = "must be an object whose type is text or grammar"
            raise RequestError(f"{where}.format {rule}, got {shown(other)}", param=f"{where}.format")
    if own := next((name for name in _OF_FUNCTIONS if tool.get(name) is not None), None):
        raise unknown_field(own, _FIELDS, where)
    told = {name: value for name, value in tool.items() if name not in _UNTOLD}
    return {**told, "parameters": _PARAMETERS, "strict": True}


def arguments_of(text: object, where: str) -> str:
    """Return an earlier call's text as the function's arguments. Raises RequestError."""
    return json.dumps({_INPUT: checked_string(text, f"{where}.input")}, ensure_ascii=False)


def input_of(arguments: str) -> str:
    """Return the text of a call, as far as it has come; what is none of these arguments is the text itself."""
    try:
        found = from_json(arguments, allow_partial="trailing-strings")
    except ValueError:
        return arguments
    text = found.get(_INPUT, "" if not found else None) if isinstance(found, dict) else None
    return text if isinstance(text, str) else arguments
