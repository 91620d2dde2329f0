"""Models write their calls in several forms; the forms have this in common.

A form finds the place where calls may begin and reads the *segment* that begins there. Both are pure functions of the
text so far, and neither takes back what it has said of less of it: names stay, arguments only grow, an end is final.
So what a stream tells is the difference of two readings (call_reader.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from .values.gemma_text import ArgumentsWalk
from .values.json_text import GAP, Scans, dumps, escaped, loads, skip_gap
from .values.python_text import ValueWalk

NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
_KEYS = {"name", "arguments", "parameters", "type", "id", "tool_name", "tool_call_id"}  # the last two: Command's
_LONGEST_KEY = max(map(len, _KEYS))
_TEXT = r'[^"\\]{0,128}+'  # as long as a name may be
_NAME_KEY, _ID_KEY = (rf'"{key}"{GAP}:{GAP}"' for key in ("(?:tool_)?+name", "tool_call_id"))
_BEGIN = rf'\{{{GAP}(?:{_ID_KEY}{_TEXT}"{GAP},{GAP})?+'
_HEAD = re.compile(rf'{_BEGIN}{_NAME_KEY}({_TEXT})"{GAP},{GAP}"(?:arguments|parameters)"{GAP}:{GAP}(?=\{{)')
# Longer than any call's: what began so is told, and not read anew at each piece of text to its end.
_TOO_LONG = re.compile(rf'{_BEGIN}(?:(?:{_NAME_KEY}|{_ID_KEY}){_TEXT}[^"\\]|\s)')
_FIRST_KEY = re.compile(rf'\{{{GAP}"(?:([^"\\]{{0,{_LONGEST_KEY}}}+)"|[^"\\]{{{_LONGEST_KEY + 1}}})')
_CLOSING = re.compile(rf"{GAP}\}}")

Schemas = Mapping[str, Mapping[str, object]]  # a tool's parameters by its name


class Tags(NamedTuple):
    """Tags stand around calls, or around a model's reasoning."""

    begin: str
    end: str


class Call(NamedTuple):
    """A call as far as it is written. `arguments` is JSON where the model wrote JSON to its end."""

    name: str
    arguments: str


class Place(NamedTuple):
    """The place where a segment begins. Not sure: what follows may turn out to be something else."""

    start: int
    is_sure: bool


def first_place(places: Iterable[Place | None]) -> Place | None:
    """Return the one that begins first, of two at one place the one that is sure; None: there is none."""
    found = [place for place in places if place is not None]
    return min(found, key=lambda place: (place.start, not place.is_sure), default=None)


class Segment(NamedTuple):
    """A segment's calls so far, and where it ends. An end without calls: up to there it was no call, but content."""

    calls: Sequence[Call] = ()
    end: int | None = None


class Progress:
    """A segment's beginning, as far as it was read: a shortcut that changes no reading.

    One belongs to one segment of one text that grows.
    """

    __slots__ = ("arguments", "at", "calls", "inner", "scans", "walk", "written")

    def __init__(self) -> None:
        self.scans = Scans()
        self.calls: list[Call] = []  # that are over
        self.written: list[str] = []  # parameters of the last one, as JSON
        self.at = 0  # where the rest begins; 0: nothing was read
        self.inner: Progress | None = None  # of the array, or the call, that begins there
        self.walk: ValueWalk | None = None  # through the value that is being written in Python
        self.arguments: ArgumentsWalk | None = None  # through those that are being written in Gemma 4's form


class Syntax(Protocol):
    """One form of calls."""

    @property
    def marks(self) -> frozenset[str]:
        """The tokens that must be seen in the text, though they may be special ones."""
        ...

    def find(self, text: str, *, is_start: bool) -> Place | None:
        """Find the first segment; `is_start`: nothing was said before this text."""
        ...

    def read(self, text: str, progress: Progress, *, is_final: bool) -> Segment:
        """Read the segment that `text` begins with. With `is_final` it has an end."""
        ...


class JsonCall(NamedTuple):
    """The object of one call, read: no call, where `call` is None and there is an end."""

    call: Call | None
    end: int | None


NameCheck = Callable[[str], bool]


def is_any_name(name: str) -> bool:
    return NAME.fullmatch(name) is not None


def read_json_call(text: str, at: int, is_name: NameCheck, scans: Scans, *, is_final: bool) -> JsonCall:
    """Read `{"name": ..., "arguments": {...}}` at `at`; with other fields or in another order, once it is whole."""
    head = _HEAD.match(text, at)
    if head is not None and is_name(head[1]):
        arguments = scans.value(text, head.end())
        call = Call(head[1], scans.escaped(text, head.end(), arguments.end))
        if arguments.state == "done":
            return JsonCall(call, _object_end(text, at, arguments.end, scans, is_final=is_final))
        return JsonCall(call, arguments.end if is_final or arguments.state == "broken" else None)
    first = _FIRST_KEY.match(text, at)
    if (first is not None and first[1] not in _KEYS) or _TOO_LONG.match(text, at) is not None:
        return JsonCall(None, at + 1)
    whole = scans.value(text, at)
    if whole.state == "open" and not is_final:
        return JsonCall(None, None)
    found = _whole_call(text[at : whole.end], is_name) if whole.state == "done" else None
    return JsonCall(found, max(whole.end, at + 1))


def _object_end(text: str, start: int, arguments_end: int, scans: Scans, *, is_final: bool) -> int | None:
    """Return where the object around the arguments ends; None: not yet."""
    if (closing := _CLOSING.match(text, arguments_end)) is not None:
        return closing.end()
    if skip_gap(text, arguments_end) == len(text):
        return len(text) if is_final else None
    whole = scans.value(text, start)
    if whole.state == "open":
        return whole.end if is_final else None
    return whole.end if whole.state == "done" else arguments_end


def _whole_call(text: str, is_name: NameCheck) -> Call | None:
    value = loads(text)
    name = value.get("name", value.get("tool_name")) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(name, str) or not is_name(name):
        return None
    match value.get("arguments", value.get("parameters")):
        case None:
            return Call(name, "{}")
        case dict() as arguments:
            return Call(name, dumps(arguments))
        case str() as arguments:  # half a surrogate pair is in no answer
            return Call(name, escaped(arguments.encode("utf-8", "replace").decode()) or "{}")
    return None


def read_json_calls(text: str, at: int, is_name: NameCheck, progress: Progress, *, is_final: bool) -> Segment:
    """Read an array of such objects at `at`, or one alone."""
    if text[at] != "[":
        read = read_json_call(text, at, is_name, progress.scans, is_final=is_final)
        return Segment((read.call,) if read.call is not None else (), read.end)
    calls = progress.calls
    at = progress.at or at + 1
    while True:
        at = skip_gap(text, at)
        if at == len(text):
            return Segment(calls, at if is_final else None)
        if text[at] == "," and calls:
            at += 1
            continue
        if text[at] == "]" and calls:
            return Segment(calls, at + 1)
        if text[at] != "{":
            return Segment(calls, at)
        read = read_json_call(text, at, is_name, progress.scans, is_final=is_final)
        if read.call is None:
            return Segment(calls, at if calls and read.end is not None else read.end)
        if read.end is None:
            return Segment([*calls, read.call])
        calls.append(read.call)
        at = progress.at = read.end
