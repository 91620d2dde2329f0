"""Arguments as Gemma 4 writes them, which become JSON while they are being written.

    {city:<|"|>Oslo<|"|>,days:[1,2],exact:true}   ─>   {"city": "Oslo", "days": [1, 2], "exact": true}

Keys are bare. A text stands between two marks as it is, without escapes, and is told as it comes; other values are told
once they are over. What else a model may write there is read as it is meant: keys in marks, JSON's strings, Python's
None, words without marks, a comma before a bracket.
"""

from __future__ import annotations

import json
import re
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Literal

from .json_text import State, dumps, ends_with_part_of, loads, skip_blank

MARK = '<|"|>'
END_CALL = "<tool_call|>"
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}
_KEY = re.compile(rf"(?:{re.escape(MARK)}([^<:]{{0,256}}){re.escape(MARK)}|([^<:{{}}\[\],]{{1,256}}))\s{{0,16}}:")
_MAY_BE_KEY = re.compile(r"[^:{}\[\],]{0,300}")
_BEHIND_WORD = re.compile(rf"[,}}\]]|{re.escape(END_CALL)}")
_MAX_WORD_CHARS = 1024  # of a value without marks: each piece of text looks for its end anew
_MAX_DEPTH = 64
_CLOSING = {"{": "}", "[": "]"}


@dataclass(slots=True)
class ArgumentsWalk:
    """A way through a call's arguments, as far as it was gone; `texts`: the parameters that can be nothing but texts.

    `written` is JSON, but for brackets and quotes that are open; it only grows. Where the arguments are broken, `at` is
    the place where they are, and what was open is closed.
    """

    at: int
    texts: Set[str]
    written: str = ""
    state: State = "open"
    _expects: Literal["key", "value", "next", "text"] = "value"
    _open: list[str] = field(default_factory=list)  # the brackets that close what is open, the last one first to come
    _before: str = ""  # what is written with the next value: a comma, a key
    _is_text: bool = False  # the value to come is of a parameter that is nothing but a text

    @property
    def has_shown(self) -> bool:
        """Tell whether there are arguments, if none: broken ones of which nothing was read are no arguments."""
        return self.state == "done" or len(self.written) > 1

    def go_on(self, text: str) -> None:
        """Go as far as the text reaches."""
        while self.state == "open" and self._step(text):
            pass

    def _step(self, text: str) -> bool:
        """Go one step; False: it needs more text."""
        if self._expects == "text":
            return self._go_through_text(text)
        self.at = skip_blank(text, self.at)
        if self.at == len(text):
            return False
        may_close = self._expects != "value" or self._open[-1:] == ["]"]
        if may_close and text[self.at] == self._open[-1]:
            return self._close()
        match self._expects:
            case "next":
                return self._go_over_comma(text)
            case "key":
                return self._go_over_key(text)
        return self._go_into_value(text)

    def _close(self) -> bool:
        self.written += self._open.pop()
        self.at += 1
        self._before, self._expects = "", "next"
        if not self._open:
            self.state = "done"
        return True

    def _go_over_comma(self, text: str) -> bool:
        if text[self.at] != ",":
            return self._break()
        self.at += 1
        self._before = ", "
        self._expect_next()
        return True

    def _go_over_key(self, text: str) -> bool:
        if (key := _KEY.match(text, self.at)) is None:
            return _MAY_BE_KEY.fullmatch(text, self.at) is None and self._break()
        name = (key[1] or key[2] or "").strip().strip('"')
        self.at = key.end()
        self._before += f"{dumps(name)}: "
        self._expects = "value"
        self._is_text = len(self._open) == 1 and name in self.texts
        return True

    def _go_into_value(self, text: str) -> bool:
        char = text[self.at]
        if char in _CLOSING:
            if len(self._open) == _MAX_DEPTH:
                return self._break()
            self._write(char)
            self._open.append(_CLOSING[char])
            self.at += 1
            self._is_text = False
            self._expect_next()
            return True
        if text.startswith(MARK, self.at):
            self._write('"')
            self.at += len(MARK)
            self._expects = "text"
            return True
        return self._go_over_word(text)

    def _go_over_word(self, text: str) -> bool:
        """Go over a value without marks: a number, a word of JSON, or what is a text all the same."""
        end = _BEHIND_WORD.search(text, self.at, self.at + _MAX_WORD_CHARS)
        if end is None and len(text) < self.at + _MAX_WORD_CHARS:
            return False
        if end is None or end.start() == self.at:
            return self._break()
        self._write(_word(text[self.at : end.start()].strip(), is_text=self._is_text))
        self.at, self._expects = end.start(), "next"
        return True

    def _go_through_text(self, text: str) -> bool:
        end = text.find(MARK, self.at)
        stop = end if end >= 0 else len(text) - ends_with_part_of(text, MARK)
        self.written += json.dumps(text[self.at : stop], ensure_ascii=False)[1:-1]
        self.at = stop
        if end < 0:
            return False
        self.written += '"'
        self.at += len(MARK)
        self._expects = "next"
        return True

    def _expect_next(self) -> None:
        self._expects = "key" if self._open[-1] == "}" else "value"

    def _write(self, value: str) -> None:
        self.written += self._before + value
        self._before = ""

    def _break(self) -> bool:
        self.state = "broken"
        if self.has_shown:
            self.written += "".join(reversed(self._open))
        return True


def _word(text: str, *, is_text: bool) -> str:
    """Return a value without marks as JSON. `is_text`: its parameter is nothing but a text, though null may be none."""
    word, value = _WORDS.get(text.lower()), loads(text)
    if word is not None and (word == "null" or not is_text):
        return word
    if isinstance(value, int | float) and not is_text:
        return text
    return dumps(value if isinstance(value, str) else text)
