"""A request's body: read with a bound and a deadline, then parsed more strictly than JSON parsers do.

Refused with the position: bytes that are not UTF-8, NaN and infinities, numbers out of range, a key that stands
twice in one object, nesting that no body of this API has, and lone surrogates (which no tokenizer takes).
The fast path is the C parser alone; the slow walk of `_first_fault` runs only where something is known to be wrong.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterable

from starlette.requests import Request
from starlette.types import Receive

from ..common.errors import RequestError
from .errors import clip

MAX_BODY_BYTES = 32 * 2**20
MAX_DEPTH = 32
BODY_TIMEOUT_S = 10.0


class ClientGone(Exception):
    """The client closed its connection before the request was whole or the answer was."""


async def read_body(request: Request, *, max_bytes: int = MAX_BODY_BYTES, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """The whole body. 413 as soon as the declared or the counted length passes `max_bytes`, 408 after `timeout_s`."""
    _check_content_type(request.headers.get("content-type", ""))
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(f"{declared[:20]} bytes", max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(request.receive, max_bytes)
    except TimeoutError:
        raise RequestError(
            f"the request's body did not arrive within {timeout_s:g} s", code="request_timeout", status=408
        ) from None


async def _read(receive: Receive, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise _too_large(f"more than {max_bytes} bytes", max_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _check_content_type(value: str) -> None:
    # A browser sends any other type to any host without asking: a page could then talk to a server on localhost.
    kind = value.partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            f"the body must have Content-Type: application/json, got {clip(value)}",
            code="unsupported_media_type",
            status=415,
        )


def _too_large(size: str, max_bytes: int) -> RequestError:
    return RequestError(
        f"the request's body has {size}; the limit is {max_bytes}", code="request_too_large", status=413
    )


# --- JSON ---------------------------------------------------------------------------------------------------


class _Fault(ValueError):
    """Something that `_first_fault` will find again, with its position."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _Fault
    return result


def _constant(name: str) -> object:
    raise _Fault


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Fault
    return value


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]:,]|[^\s"{}\[\]:,]+', re.DOTALL)


def parse_json(data: bytes) -> dict[str, object]:
    """The body's object, or a RequestError that says what is wrong and where."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _invalid(f"not UTF-8 at byte {error.start}") from None
    try:
        value = _decoder.decode(text)
        suspicious = _SURROGATE.search(text) is not None
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
            if not _is_encodable(last_string):
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
        elif token != "," and not _is_plain(token):
            return f"{clip(token, 24)} is not a number that JSON has", start
    return None


def _tokens(text: str) -> Iterable[tuple[str, int]]:
    return ((match.group(), match.start()) for match in _TOKEN.finditer(text))


def _unescape(token: str) -> str:
    text: str = json.loads(token, strict=False) if "\\" in token else token[1:-1]
    return text


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_plain(token: str) -> bool:
    """true, false, null or a finite number of sane length."""
    if token in ("true", "false", "null"):
        return True
    try:
        value = json.loads(token)
    except ValueError:
        return False
    return isinstance(value, (int, float)) and math.isfinite(value)
