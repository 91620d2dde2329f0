"""Calls as Python's: of OLMo 3, of LFM2, and of Llama 3.2 and others whose templates ask for a list.

    <function_calls>              [search(query="x", limit=2), search(query='y')]
    search(query="x", limit=2)
    search(query='y')
    </function_calls>

A list begins the answer or stands behind a mark, and outside of tags only tools that there are can be called. Arguments
are told one at a time, as JSON of what Python means; what it does not know, as words without quotes, is a text.
"""

from __future__ import annotations

import re

from .json_syntaxes import after_mark, find_first
from .parameter_types import arguments_of, parameter_kinds
from .syntax import NAME, Call, JsonCall, NameCheck, Place, Progress, Schemas, Segment, is_any_name
from .values.json_text import GAP, SEPARATOR, dumps, skip_blank, skip_gap
from .values.python_text import ValueWalk, literal

_TAG = "<function_calls>"
_ENDS = {
    _TAG: "</function_calls>",
    "<|tool_call_start|>": "<|tool_call_end|>",
    "<|python_start|>": "<|python_end|>",
    "<|python_tag|>": "",
}
_SURE = (_TAG, "<|tool_call_start|>")  # what stands behind is a call, whatever its name
_HEAD = re.compile(rf"({NAME.pattern}){GAP}\({GAP}")
_MAY_BE_HEAD = re.compile(rf"(?:{NAME.pattern}{GAP})?+")
_KEY = re.compile(rf"([A-Za-z_]\w{{0,255}}){GAP}=")
_MAY_BE_KEY = re.compile(rf"(?:[A-Za-z_]\w{{0,255}}{GAP})?+")


class PythonicSyntax:
    marks = frozenset({*_ENDS, *_ENDS.values()} - {""})

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas

    def find(self, text: str, *, is_start: bool) -> Place | None:
        start = skip_blank(text, 0)
        if is_start and (start == len(text) or text[start] == "["):
            return Place(start, is_sure=start < len(text))
        return find_first(text, _ENDS)

    def read(self, text: str, progress: Progress, *, is_final: bool) -> Segment:
        begin = next((mark for mark in _ENDS if text.startswith(mark)), "")
        opening = skip_gap(text, len(begin))
        if opening == len(text) and not is_final:
            return Segment()
        is_list = text.startswith("[", opening)
        if not is_list and begin != _TAG:
            return Segment(end=max(len(begin), 1))
        is_name: NameCheck = is_any_name if begin in _SURE else self._schemas.__contains__
        calls, at = progress.calls, progress.at or opening + is_list
        while True:
            separator = SEPARATOR.match(text, at)
            assert separator is not None
            start = separator.end()
            if is_list and calls and text.startswith("]", start):
                return Segment(calls, _end(text, start + 1, begin, is_final=is_final))
            if not is_list and calls and _ENDS[begin].startswith(text[start : start + len(_ENDS[begin])]):
                return Segment(calls, after_mark(text, start, _ENDS[begin], is_final))
            progress.inner = progress.inner or Progress()
            head = _HEAD.match(text, start)
            if head is None or not is_name(head[1]):
                is_open = head is None and not is_final and _MAY_BE_HEAD.fullmatch(text, start) is not None
                return Segment(calls, None if is_open else at if calls else max(len(begin), 1))
            read = self._call(text, head, progress.inner, is_final=is_final)
            if read.call is None:
                return Segment(calls, None if read.end is None else at if calls else max(len(begin), 1))
            if read.end is None:
                return Segment([*calls, read.call], len(text) if is_final else None)
            calls.append(read.call)
            at = progress.at = read.end
            progress.inner = None

    def _call(self, text: str, head: re.Match[str], progress: Progress, *, is_final: bool) -> JsonCall:
        """Read one call: no end, where it goes on; no call, where it is none or nothing shows that it is one."""
        name, at, written = head[1], progress.at or head.end(), progress.written
        while True:
            start = skip_gap(text, at)
            if written and text.startswith(",", start):
                start = skip_gap(text, start + 1)
            if text.startswith(")", start):
                return JsonCall(Call(name, arguments_of(written, "}")), start + 1)
            key = _KEY.match(text, start)
            if key is None:
                is_open = not is_final and _MAY_BE_KEY.fullmatch(text, start) is not None
                so_far = Call(name, arguments_of(written, "" if is_open else "}")) if written else None
                return JsonCall(so_far, None if is_open else at)
            progress.walk = progress.walk or ValueWalk(key.end())
            end = progress.walk.go_on(text)
            if end is None:
                return JsonCall(Call(name, arguments_of(written, "")), None)
            written.append(f"{dumps(key[1])}: {self._typed(name, key[1], text[key.end() : end].strip())}")
            progress.at, progress.walk = end, None
            at = end

    def _typed(self, name: str, parameter: str, text: str) -> str:
        """Return the value as JSON; what is no text of Python's is one where the schema wants nothing else."""
        try:
            value = literal(text)
        except ValueError:
            return dumps(text)
        is_text = value is not None and parameter_kinds(self._schemas, name, parameter) == {"string"}
        return dumps(text if is_text and not isinstance(value, str) else value)


def _end(text: str, at: int, begin: str, *, is_final: bool) -> int | None:
    """Return the place behind a list and the mark that belongs behind it."""
    mark = _ENDS.get(begin, "<|python_end|>")
    return after_mark(text, at, mark, is_final) if mark else at
