"""JSON that is still being written: where a value ends, as far as that can be told from its beginning.

    {"a": "x}          OPEN: all of it belongs to the value
    {"a": [1]} and     DONE, at the brace that closes it
    {"a": 1</tool      BROKEN, at the first character that JSON cannot have there

Brackets and strings are looked at, not more: what is balanced may still be no JSON.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ...state.errors import is_unicode

State = Literal["open", "done", "broken"]

# Possessive: one pass, whatever follows.
_PLAIN = re.compile(r"[\s0-9A-Za-z+\-.,:]++")
_IN_STRING = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_BLANK = re.compile(r"\s*+")
# Between the parts of a call, and between calls: bounded, since it is read anew at each piece of text.
_MAX_GAP_CHARS = 1024
GAP = rf"\s{{0,{_MAX_GAP_CHARS}}}+"
SEPARATOR = re.compile(rf"[\s;,]{{0,{_MAX_GAP_CHARS}}}+")
_GAP = re.compile(GAP)
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+("|\\?\Z)', re.DOTALL)
_ESCAPE_OR_RAW = re.compile(r"\\[\x20-\U0010ffff]|\\?[\x00-\x1f]")


class Scan(NamedTuple):
    """The end of a value: of what there is of it, where it is open; of what is sound, where it is broken."""

    state: State
    end: int


@dataclass(slots=True)
class _Walk:
    """A way through a value, as far as it was gone."""

    at: int
    depth: int = 0
    is_in_string: bool = False

    def go_on(self, text: str) -> Scan:
        while self.at < len(text):
            if self.is_in_string:
                self._leave_string(text)
                if self.is_in_string:
                    break
            elif (char := text[self.at]) == '"':
                self.is_in_string = True
                self.at += 1
            elif char in "{[}]":
                self.at += 1
                self.depth += 1 if char in "{[" else -1
                if self.depth == 0:
                    return Scan("done", self.at)
            elif (plain := _PLAIN.match(text, self.at)) is not None:
                self.at = plain.end()
            else:
                return Scan("broken", self.at)
        return Scan("open", len(text))

    def _leave_string(self, text: str) -> None:
        """Go to the string's end; not over a backslash whose character is to come."""
        inside = _IN_STRING.match(text, self.at)
        assert inside is not None
        self.at = inside.end()
        if self.at < len(text) and text[self.at] == '"':
            self.at += 1
            self.is_in_string = False


@dataclass(slots=True)
class _Escaping:
    """A value in which line breaks and the like are escaped, as far as it is read."""

    end: int
    escaped: str = ""
    inside: str = ""  # of which string its end is: a quote, and a backslash whose character is to come

    def go_on(self, text: str, end: int) -> str:
        rest = self.inside + text[self.end : end]
        self.escaped += _STRING.sub(_escaped_string, rest)[len(self.inside) :]
        for string in _STRING.finditer(rest):
            self.inside = "" if string[1] == '"' else '"' + string[1]
        self.end = end
        return self.escaped


class Scans:
    """Finds ends of values in a text that grows: each goes on where it came to, so a long value costs one pass."""

    def __init__(self) -> None:
        self._walks: dict[int, _Walk] = {}  # by where they began
        self._ends: dict[int, Scan] = {}  # of those that are over
        self._escaping: dict[int, _Escaping] = {}

    def value(self, text: str, start: int) -> Scan:
        """Find the end of the object or array that begins at `start`."""
        if (known := self._ends.get(start)) is not None:
            return known
        walk = self._walks.setdefault(start, _Walk(start))
        scan = walk.go_on(text)
        if scan.state != "open":
            self._ends[start] = scan
            del self._walks[start]
        return scan

    def escaped(self, text: str, start: int, end: int) -> str:
        """Return the value between these places as JSON takes it: models write line breaks in strings as they are.

        What has been returned for less of the text is the beginning of what is returned for more.
        """
        return self._escaping.setdefault(start, _Escaping(start)).go_on(text, end)


def skip_blank(text: str, at: int) -> int:
    """Return the place of the next character that is no white space, or the text's end."""
    blank = _BLANK.match(text, at)
    assert blank is not None
    return blank.end()


def skip_gap(text: str, at: int) -> int:
    """Return the same where a call goes on; behind more white space than a `GAP` none does."""
    gap = _GAP.match(text, at)
    assert gap is not None
    return gap.end()


def ends_with_part_of(text: str, mark: str) -> int:
    """Return how many characters at the text's end may be the beginning of `mark`."""
    at = max(0, len(text) - len(mark) + 1)
    while (at := text.find(mark[:1], at)) >= 0:
        if mark.startswith(text[at:]):
            return len(text) - at
        at += 1
    return 0


def escaped(text: str) -> str:
    """Return a whole value as JSON takes it."""
    return Scans().escaped(text, 0, len(text))


def _escaped_string(string: re.Match[str]) -> str:
    return _ESCAPE_OR_RAW.sub(_escape, string[0])


def _escape(found: re.Match[str]) -> str:
    """Escape a raw character, behind a backslash, too; what is an escape already stays."""
    return found[0] if found[0][-1] >= " " else json.dumps(found[0][-1])[1:-1]


def loads(text: str) -> object:
    """Return the value, or None for what is no JSON, as NaN is none, and for what is larger than any number.

    Line breaks and the like may stand in strings as they are.
    """
    try:
        value: object = json.loads(escaped(text), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def dumps(value: object) -> str:
    """Return the value as JSON; escaped where it has half a surrogate pair, which models write and no answer has."""
    text = json.dumps(value, ensure_ascii=False)
    return text if is_unicode(text) else json.dumps(value)
