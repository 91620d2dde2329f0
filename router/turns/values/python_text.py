"""Values as Python writes them: where one ends that is still being written, and what it is.

Models write them by heart, so more is taken than Python takes: line breaks and apostrophes in strings, JSON's words.
A quote ends a string where something follows that may stand behind one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .json_text import skip_blank

_WORDS: dict[str, object] = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_WORD = re.compile(r"[A-Za-z]+")
_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d*)(\.\d*)?([eE][+-]?\d+)?(?![\w.])")
_INSIDE = {quote: re.compile(rf"[^{quote}\\]*+(?:\\.[^{quote}\\]*+)*+", re.DOTALL) for quote in "'\""}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
_OPENING, _CLOSING = "([{", ")]}"
_BEFORE_STRING, _BEHIND_STRING = "=,:([{", ",:)]}"
_MAX_DEPTH = 64


@dataclass(slots=True)
class ValueWalk:
    """A way through an argument's value, as far as it was gone: a long one costs one pass."""

    at: int
    depth: int = 0
    quote: str = ""  # of the string that it is in
    may_quote: bool = True  # a quote begins a string here, and is no apostrophe

    def go_on(self, text: str) -> int | None:
        """Return the place of the comma or bracket behind the value; None: it goes on."""
        while self.at < len(text):
            char = text[self.at]
            if self.quote:
                end = _string_end(text, self.at, self.quote)
                if not isinstance(end, _Open):
                    self.at, self.quote, self.may_quote = end, "", False
                    continue
                self.at = end.at
                return None
            if char in _INSIDE and self.may_quote:
                if text[self.at :] in (char, char * 2):  # three of them may come
                    return None
                self.quote = char * 3 if text.startswith(char * 3, self.at) else char
                self.at += len(self.quote)
                continue
            if self.depth == 0 and char in ",)":
                return self.at
            self.at += 1
            self.depth += (char in _OPENING) - (char in _CLOSING and self.depth > 0)
            self.may_quote = char in _BEFORE_STRING if not char.isspace() else self.may_quote
        return None


@dataclass(slots=True, frozen=True)
class _Open:
    """A string has no end yet; `at`: from where it is to be looked for."""

    at: int


def _string_end(text: str, at: int, quote: str, *, is_whole: bool = False) -> int | _Open:
    """Return the place behind the string's last quote. `is_whole`: nothing comes behind the text."""
    while True:
        inside = _INSIDE[quote[0]].match(text, at)
        assert inside is not None
        at = inside.end()
        if at == len(text) or text[at] == "\\":
            return _Open(at)
        if len(quote) == 3:
            if text.startswith(quote, at):
                return at + 3
            if quote.startswith(text[at:]):
                return _Open(at)
        else:
            behind = skip_blank(text, at + 1)
            if behind == len(text):
                return at + 1 if is_whole else _Open(at)
            if text[behind] in _BEHIND_STRING:
                return at + 1
        at += 1


def literal(text: str) -> object:
    """Return the value that a whole text is. Raises ValueError where it is none."""
    reader = _Reader(text)
    value = reader.value(0)
    if skip_blank(text, reader.at) < len(text):
        raise ValueError(text)
    return value


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self.at = 0

    def value(self, depth: int) -> object:
        """Read a value, and go behind it."""
        self.at = skip_blank(self._text, self.at)
        char = self._text[self.at : self.at + 1]
        if not char or depth > _MAX_DEPTH:
            raise ValueError(self._text)
        if char in _INSIDE:
            return self._string(char)
        if char in "[(":
            return self._list("]" if char == "[" else ")", depth)
        if char == "{":
            return self._object(depth)
        if (number := _NUMBER.match(self._text, self.at)) is not None:
            self.at = number.end()
            return _number(number)
        if (word := _WORD.match(self._text, self.at)) is not None and word[0] in _WORDS:
            self.at = word.end()
            return _WORDS[word[0]]
        raise ValueError(self._text)

    def _string(self, char: str) -> str:
        quote = char * 3 if self._text.startswith(char * 3, self.at) else char
        start = self.at + len(quote)
        end = _string_end(self._text, start, quote, is_whole=True)
        if isinstance(end, _Open):
            raise ValueError(self._text)
        self.at = end
        return _ESCAPE.sub(_unescaped, self._text[start : end - len(quote)])

    def _list(self, end: str, depth: int) -> list[object]:
        items = []
        self.at += 1
        while not self._takes(end):
            items.append(self.value(depth + 1))
            if not self._takes(",") and not self._is_at(end):
                raise ValueError(self._text)
        return items

    def _object(self, depth: int) -> dict[str, object]:
        found = {}
        self.at += 1
        while not self._takes("}"):
            key = self.value(depth + 1)
            if not isinstance(key, str) or not self._takes(":"):
                raise ValueError(self._text)
            found[key] = self.value(depth + 1)
            if not self._takes(",") and not self._is_at("}"):
                raise ValueError(self._text)
        return found

    def _is_at(self, mark: str) -> bool:
        self.at = skip_blank(self._text, self.at)
        return self._text.startswith(mark, self.at)

    def _takes(self, mark: str) -> bool:
        found = self._is_at(mark)
        self.at += len(mark) if found else 0
        return found


def _number(found: re.Match[str]) -> int | float:
    if found[1] is None and found[2] is None:
        return int(found[0])
    value = float(found[0])
    if not math.isfinite(value):
        raise ValueError(found[0])
    return value


def _unescaped(found: re.Match[str]) -> str:
    code = found[1] or found[2]
    if code is not None:
        return chr(int(code, 16))
    char = found[3]
    return _ESCAPED.get(char, char if char in "'\"\\/" else found[0])
