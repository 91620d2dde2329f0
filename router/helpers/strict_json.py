"""JSON more strictly than JSON parsers take it, with the position of what is wrong.

Refused: bytes that are not UTF-8, NaN and infinities, numbers out of range, a key that stands twice in one object,
nesting that no body of this API has, lone surrogates (which no tokenizer takes), and values without end.
The fast path is the C parser alone; the slow walk of `_first_fault` runs only where something is known to be wrong.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable

from ...common.errors import RequestError
from ...common.request import WHOLE_NUMBERS
from ..state.errors import clip, is_unicode

MAX_COMMAS = 500_000
MAX_OBJECTS = 50_000
MAX_DEPTH = 32
_COUNTED_BYTES = 2**20


class _Fault(ValueError):
    """Something that `_first_fault` will find again, with its position."""


class _Objects:
    """Makes the objects of one text."""

    __slots__ = ("_count",)

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        self._count += 1
        if self._count > MAX_OBJECTS:
            raise _too_many(MAX_OBJECTS, "objects")
        result = dict(pairs)
        if len(result) != len(pairs):
            raise _Fault
        return result


def _constant(_name: str) -> object:
    raise _Fault


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Fault
    return value


def _int(text: str) -> int:
    value = int(text)
    if value not in WHOLE_NUMBERS:
        raise _Fault
    return value


_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]:,]|[^\s"{}\[\]:,]+', re.DOTALL)


def parse_json(data: bytes, max_commas: int = MAX_COMMAS) -> dict[str, object]:
    """The body's object, or a RequestError that says what is wrong and where."""
    _check_commas(data, max_commas)
    try:
        text = data.decode().removeprefix("\ufeff")  # with which some programs begin a text
    except UnicodeDecodeError as error:
        raise _invalid(f"not UTF-8 at byte {error.start}") from None
    try:
        decoder = json.JSONDecoder(
            object_pairs_hook=_Objects(), parse_constant=_constant, parse_float=_float, parse_int=_int
        )
        value = decoder.decode(text)
        # Perhaps half a surrogate pair, or deeper than anything that this API takes.
        suspicious = "\\ud" in text or "\\uD" in text or (_may_be_deep(text) and _is_deep(value))
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except (ValueError, RecursionError):
        suspicious = True
        value = None
    if suspicious and (fault := _first_fault(text)) is not None:
        what, offset = fault
        line = text.count("\n", 0, offset) + 1
        raise _invalid(f"{what} at line {line} column {offset - text.rfind(chr(10), 0, offset)}")
    if not isinstance(value, dict):
        raise _invalid("the body must be an object")
    return value


def _may_be_deep(text: str) -> bool:
    return text.count("{") + text.count("[") > MAX_DEPTH


def _is_deep(value: object) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        children = (child for each in level for child in (each.values() if isinstance(each, dict) else each))
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _check_commas(data: bytes, limit: int) -> None:
    """Values of no bytes to speak of would become a hundred times their size."""
    num_commas = 0
    for start in range(0, len(data) if len(data) > limit else 0, _COUNTED_BYTES):
        num_commas += data.count(b",", start, start + _COUNTED_BYTES)
        if num_commas > limit:
            raise _too_many(limit, "commas")


def _too_many(limit: int, what: str) -> RequestError:
    return RequestError(
        f"the body has more than {limit} {what}: send less in one call", code="request_too_large", status=413
    )


def _invalid(what: str) -> RequestError:
    return RequestError(f"the body is not valid JSON for this API: {what}", code="invalid_json")


def _first_fault(text: str) -> tuple[str, int] | None:
    """Walk the tokens of syntactically sound JSON: what is wrong first, and at which offset."""
    scopes: list[set[str] | None] = []  # keys seen in each open object, None for an array
    last_string: str | None = None
    last_start = 0
    for token, start in _tokens(text):
        if token[0] == '"':
            last_string, last_start = _unescape(token), start
            if not is_unicode(last_string):
                return "a lone surrogate in a string", start
        elif token in "{[":
            scopes.append(set() if token == "{" else None)
            if len(scopes) > MAX_DEPTH:
                return f"nesting deeper than {MAX_DEPTH}", start
        elif token in "}]":
            if scopes:
                scopes.pop()
        elif token == ":":
            keys = scopes[-1] if scopes else None
            if keys is not None and last_string is not None:
                if last_string in keys:
                    return f"the key {clip(last_string)} stands twice in one object", last_start
                keys.add(last_string)
        elif token != "," and (why := _why_not_plain(token)):
            return f"{clip(token, 24)} {why}", start
    return None


def _tokens(text: str) -> Iterable[tuple[str, int]]:
    return ((match.group(), match.start()) for match in _TOKEN.finditer(text))


def _unescape(token: str) -> str:
    text: str = json.loads(token, strict=False) if "\\" in token else token[1:-1]
    return text


def _why_not_plain(token: str) -> str:
    """Tell what is wrong; nothing for true, false, null and numbers of sane size."""
    if token in ("true", "false", "null"):
        return ""
    try:
        value = json.loads(token)
    except ValueError:
        return "is not a number that JSON has"
    if isinstance(value, int):
        return "" if value in WHOLE_NUMBERS else "is a whole number of more than 64 bits"
    return "" if isinstance(value, float) and math.isfinite(value) else "is not a number that JSON has"
