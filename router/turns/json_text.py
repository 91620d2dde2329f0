"""JSON that is still being written: where a value ends, as far as that can be told from its beginning.

    {"a": "x}          OPEN: all of it belongs to the value
    {"a": [1]} and     DONE, at the brace that closes it
    {"a": 1</tool      BROKEN, at the first character that JSON cannot have there

Brackets and strings are looked at, not more: what is balanced may still be no JSON.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

State = Literal["open", "done", "broken"]

# Possessive, so that a long string without an end costs one pass.
_TOKEN = re.compile(r'[\s0-9A-Za-z+\-.,:]++|"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]]', re.DOTALL)
_BLANK = re.compile(r"\s*+")


@dataclass(slots=True, frozen=True)
class Scan:
    """The end of a value: of what there is of it, where it is open; of what is sound, where it is broken."""

    state: State
    end: int


def scan_value(text: str, start: int) -> Scan:
    """Find the end of the object or array that begins at `start`."""
    depth, at = 0, start
    while (token := _TOKEN.match(text, at)) is not None:
        char, at = text[at], token.end()
        if char in "{[":
            depth += 1
        elif char in "}]":
            depth -= 1
            if depth == 0:
                return Scan("done", at)
    return Scan("open", len(text)) if at == len(text) or text[at] == '"' else Scan("broken", at)


def skip_blank(text: str, at: int) -> int:
    """Return the place of the next character that is no white space, or the text's end."""
    blank = _BLANK.match(text, at)
    assert blank is not None
    return blank.end()


def ends_with_part_of(text: str, mark: str) -> int:
    """Return how many characters at the text's end may be the beginning of `mark`."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0


def loads(text: str) -> object:
    """Return the value, or None for what is no JSON."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
