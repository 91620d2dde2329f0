"""A batch's input: a request a line, checked whole before the first one is asked.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}

What stands around a body, the model that it names and whether it wants a stream are checked here, and fail the batch
with the line's number. What else is wrong in a body is the line's own error, when its turn comes: also what makes it
none for this API, though it is JSON, such as a key that stands twice.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from ...common.errors import RequestError
from ..helpers.json_parser import JsonParser
from ..state.errors import clip
from .record import InputFault

MAX_LINES = 50_000  # OpenAI's
MAX_LINE_BYTES = 8 * 2**20  # a million tokens as text, and what stands around them
MAX_FAULTS = 100  # told of one input
_MAX_ID_CHARS = 512
_READ_LINES, _READ_BYTES = 256, 4 * 2**20  # in one go of a thread
_KEYS = frozenset({"custom_id", "method", "url", "body"})
# Halves of surrogate pairs, of which msgspec takes no lone ones, and something as long that it takes.
_SURROGATE, _ANY_OTHER = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}"), rb"\\u0020"
# Spaces, and byte order marks, which Windows' programs put before a text: several texts may have become one file.
_BEFORE_A_LINE = re.compile(rb"(?:\xef\xbb\xbf|\s)*")

CheckModel = Callable[[str | None], object]  # raises RequestError for a model that is not served


class InputLine(NamedTuple):
    """One request's place in the file."""

    custom_id: str
    offset: int
    length: int
    model: str | None  # that it names


class _RawLine(NamedTuple):
    number: int  # from 1, in the file
    offset: int
    data: bytes | None  # None: too long


class _Body(msgspec.Struct):
    body: msgspec.Raw


async def read_input(
    path: Path, endpoint: str, json: JsonParser, check_model: CheckModel
) -> tuple[list[InputLine], list[InputFault]]:
    """Return the requests of an input and what is wrong with it. Raises CapacityError where it could not be parsed."""
    lines: list[InputLine] = []
    faults: list[InputFault] = []
    numbers: dict[str, int] = {}  # of each custom_id
    models: dict[str | None, str | None] = {}  # of each name one text, not one of each line
    with path.open("rb") as file:
        raw = _raw_lines(file)
        while len(faults) < MAX_FAULTS and (group := await asyncio.to_thread(_group, raw)):
            for each in group:
                await asyncio.sleep(0)  # streams go on meanwhile
                try:
                    custom_id, model = await _checked(each, endpoint, json, check_model)
                    _check_new(custom_id, each.number, numbers)
                except RequestError as error:
                    faults.append(InputFault(error.code or "invalid_request", str(error), each.number, error.param))
                else:
                    assert each.data is not None
                    lines.append(InputLine(custom_id, each.offset, len(each.data), models.setdefault(model, model)))
                if len(lines) > MAX_LINES:
                    text = f"a batch has at most {MAX_LINES} requests"
                    return lines, [InputFault("too_many_requests", text, each.number)]
    if not lines and not faults:
        faults.append(InputFault("empty_file", "the input file has no request"))
    return lines, faults[:MAX_FAULTS]


def read_body(path: Path, line: InputLine) -> bytes:
    """Return the body of one request, as it stands in the file."""
    with path.open("rb") as file:
        file.seek(line.offset)
        data = file.read(line.length)
    return data[_place_of_body(data)]


def _place_of_body(data: bytes) -> slice:
    """Return where a line's body stands. Raises MsgspecError, and RecursionError, for what is no line of JSON."""
    sound = _SURROGATE.sub(_ANY_OTHER, data) if b"\\u" in data else data
    body = msgspec.json.decode(sound, type=_Body).body
    # No string holds the like: the quote before an object's first key would end it.
    start = sound.rfind(body)
    return slice(start, start + len(body))


def _raw_lines(file: BinaryIO) -> Iterator[_RawLine]:
    """Yield the lines that are not blank. No more than one line is in memory."""
    number = offset = 0
    while piece := file.readline(MAX_LINE_BYTES + 1):
        number, start, offset = number + 1, offset, offset + len(piece)
        if len(piece) > MAX_LINE_BYTES and not piece.endswith(b"\n"):
            while not piece.endswith(b"\n") and (piece := file.readline(MAX_LINE_BYTES)):
                offset += len(piece)
            yield _RawLine(number, start, None)
            continue
        text = _BEFORE_A_LINE.sub(b"", piece, count=1)
        if data := text.rstrip():
            yield _RawLine(number, start + len(piece) - len(text), data)


def _group(lines: Iterator[_RawLine]) -> list[_RawLine]:
    group: list[_RawLine] = []
    num_bytes = 0
    for line in lines:
        group.append(line)
        num_bytes += len(line.data or b"")
        if len(group) >= _READ_LINES or num_bytes >= _READ_BYTES:
            break
    return group


async def _checked(line: _RawLine, endpoint: str, json: JsonParser, check_model: CheckModel) -> tuple[str, str | None]:
    """Return a line's custom_id, and the model that it names. Raises RequestError."""
    if line.data is None:
        raise RequestError(f"the line has more than {MAX_LINE_BYTES} bytes", code="line_too_long")
    request, is_read = await _parsed(line.data, json)
    custom_id, body = request.get("custom_id"), request.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= _MAX_ID_CHARS:
        raise _invalid("custom_id", f"must be a string of 1 to {_MAX_ID_CHARS} characters")
    if request.get("method") != "POST":
        raise _invalid("method", "must be POST")
    if request.get("url") != endpoint:
        raise RequestError(f"url: must be the batch's endpoint, {endpoint}", param="url", code="mismatched_endpoint")
    if not isinstance(body, dict):
        raise _invalid("body", "must be an object")
    if unknown := request.keys() - _KEYS:
        raise _invalid(min(unknown), "is no field of a batch's line")
    if not is_read:
        return custom_id, None
    if body.get("stream"):
        raise _invalid("body.stream", "a batch's answers are whole: leave it away")
    return custom_id, _checked_model(body.get("model"), check_model)


async def _parsed(data: bytes, json: JsonParser) -> tuple[dict[str, object], bool]:
    """Return a line, and whether its body could be read; where it could not, it is empty. Raises RequestError."""
    try:
        return await json.parse(data), True
    except RequestError as error:
        fault = _no_json(error)
    try:
        place = await asyncio.to_thread(_place_of_body, data)
    except (msgspec.MsgspecError, RecursionError):
        raise fault from None
    body = data[place]
    if not body.startswith(b"{"):
        raise fault
    try:
        request = await json.parse(b"".join((data[: place.start], b"{}".ljust(len(body)), data[place.stop :])))
    except RequestError as error:
        raise _no_json(error) from None
    try:
        return {**request, "body": await json.parse(body)}, True  # by itself it is one level less deep
    except RequestError:
        return request, False


def _no_json(error: RequestError) -> RequestError:
    return RequestError(str(error), code="invalid_json_line")


def _checked_model(model: object, check_model: CheckModel) -> str | None:
    if not isinstance(model, str | None):  # it is the body's own error
        return None
    try:
        check_model(model)
    except RequestError as error:
        raise RequestError(str(error), code=error.code, param="body.model") from None
    return model


def _check_new(custom_id: str, number: int, numbers: dict[str, int]) -> None:
    first = numbers.setdefault(custom_id, number)
    if first != number:
        raise RequestError(
            f"custom_id: {clip(custom_id)} stands in line {first} already",
            param="custom_id",
            code="duplicate_custom_id",
        )


def _invalid(param: str, text: str) -> RequestError:
    name = clip(param).strip("'")
    return RequestError(f"{name}: {text}", param=name, code="invalid_request")
