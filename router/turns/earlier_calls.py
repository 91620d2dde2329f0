"""The calls of earlier turns, in an assistant's message.

Clients send a call's arguments as JSON in a string, templates want the object: it is parsed here. What a model wrote
wrongly stays a string, so that the client can send it back; so does what no template is given: nested deeper than a
schema may be, or with numbers that a message to the template's process has no room for.
"""

from __future__ import annotations

import msgspec

from ...common.request import WHOLE_NUMBERS
from ..state.errors import clip, shown
from .definitions import MAX_DEPTH, invalid, only

MAX_CALLS = 128  # in one message
MAX_ARGUMENTS_CHARS = 2**20  # of one call: parsed in a few milliseconds
_MAX_NAME_CHARS = 256


def parse_calls(raw: object, where: str, ignored: list[str] | None = None) -> list[dict[str, object]]:
    """Return the calls as chat templates know them. Raises RequestError that names the place.

    Unknown fields are refused, unless a list takes their names.
    """
    if not isinstance(raw, list):
        raise invalid(where, f"must be an array, got {shown(raw)}")
    if len(raw) > MAX_CALLS:
        raise invalid(where, f"has {len(raw)} calls; at most {MAX_CALLS} are taken")
    return [_call(each, f"{where}[{index}]", ignored) for index, each in enumerate(raw)]


def _call(raw: object, where: str, ignored: list[str] | None) -> dict[str, object]:
    if not isinstance(raw, dict):
        raise invalid(where, f"must be an object, got {shown(raw)}")
    only(raw, {"id", "type", "function", "index"}, where, ignored)
    if raw.get("type", "function") != "function":
        raise invalid(f"{where}.type", f"must be 'function', got {shown(raw['type'])}")
    function = raw.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{where}.function", f"must be an object, got {shown(function)}")
    call: dict[str, object] = {"type": "function", "function": _function(function, f"{where}.function", ignored)}
    call_id = raw.get("id")
    if call_id is not None:
        call["id"] = _name(call_id, f"{where}.id")
    return call


def _function(raw: dict[str, object], where: str, ignored: list[str] | None) -> dict[str, object]:
    only(raw, {"name", "arguments"}, where, ignored)
    return {"name": _name(raw.get("name"), f"{where}.name"), "arguments": _arguments(raw.get("arguments"), where)}


def _arguments(raw: object, where: str) -> object:
    match raw:
        case None | "":
            return {}
        case dict():
            return raw
        case str():
            if len(raw) > MAX_ARGUMENTS_CHARS:
                raise invalid(f"{where}.arguments", f"has {len(raw)} characters; {MAX_ARGUMENTS_CHARS} are taken")
            return _object_in(raw)
    raise invalid(f"{where}.arguments", f"must be a string, got {shown(raw)}")


def _object_in(text: str) -> object:
    """Return the object that the text is, or the text where it is none."""
    try:
        found: object = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return text
    return found if isinstance(found, dict) and _is_plain(found) else text


def _is_plain(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        parts = (each.values() if isinstance(each, dict) else each if isinstance(each, list) else () for each in level)
        level = [child for part in parts for child in part]
        if any(isinstance(child, int) and child not in WHOLE_NUMBERS for child in level):
            return False
        if not level:
            return True
    return False


def _name(raw: object, where: str) -> str:
    if not isinstance(raw, str) or not 1 <= len(raw) <= _MAX_NAME_CHARS:
        seen = clip(raw) if isinstance(raw, str) else shown(raw)
        raise invalid(where, f"must be a string of 1 to {_MAX_NAME_CHARS} characters, got {seen}")
    return raw
