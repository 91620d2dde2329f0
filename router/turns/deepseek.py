"""DeepSeek's forms of calls, and Hunyuan's: marks around all of them, around each, and between a call's parts.

    V3, R1   <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>search
             ```json
             {"query": "x"}
             ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
    V3.1     <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>search<｜tool▁sep｜>{"query": "x"}<｜tool▁call▁end｜>
             <｜tool▁calls▁end｜>

    Hunyuan  <tool_calls><tool_call>search
             ```json
             {"query": "x"}
             ```</tool_call></tool_calls>
    A13B     <tool_calls>[{"name": "search", "arguments": {"query": "x"}}]</tool_calls>

Both of a family are read, whatever the model's version: one may be told of the other's form.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .json_syntaxes import after_mark, find_first
from .syntax import NAME, Call, Place, Progress, Segment, is_any_name, read_json_calls
from .values.json_text import skip_gap

_SEPARATOR = "<｜tool▁sep｜>"
_FENCE = "```"
_NAME = rf"\s*+({NAME.pattern})"
_ARGUMENTS = r"\s*+(?:```(?:json)?+\s*+)?+(?=\{)"


class Marks(NamedTuple):
    """The marks of one family."""

    begin_calls: str
    end_calls: str
    begin: str
    end: str
    header: re.Pattern[str]  # of a call, behind `begin`: its last group is the name
    has_arrays: bool = False  # calls may be one array of JSON


DEEPSEEK = Marks(
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    re.compile(rf"{_NAME}\s*+{_SEPARATOR}(?:{_NAME})?+{_ARGUMENTS}"),
)
HUNYUAN = Marks(
    "<tool_calls>",
    "</tool_calls>",
    "<tool_call>",
    "</tool_call>",
    re.compile(_NAME + _ARGUMENTS),
    has_arrays=True,
)
_MAX_HEADER_CHARS = 512  # with the brace behind it; a longer one is text: it is read anew at each piece of text


class DeepSeekSyntax:
    """Calls between a family's marks."""

    def __init__(self, marks: Marks = DEEPSEEK) -> None:
        self._marks = marks
        own = {marks.begin_calls, marks.end_calls, marks.begin, marks.end}
        self.marks = frozenset(own | {_SEPARATOR} if marks is DEEPSEEK else own)

    def find(self, text: str, *, is_start: bool) -> Place | None:
        """Find either mark: the outer one is left out now and then."""
        return find_first(text, (self._marks.begin_calls, self._marks.begin))

    def read(self, text: str, progress: Progress, *, is_final: bool) -> Segment:
        marks, calls = self._marks, progress.calls
        first = len(marks.begin_calls) if text.startswith(marks.begin_calls) else 0
        if marks.has_arrays and first and text.startswith(("[", "{"), start := skip_gap(text, first)):
            read = read_json_calls(text, start, is_any_name, progress, is_final=is_final)
            ends = bool(read.calls) and read.end is not None
            return self._after_calls(text, read.end or 0, list(read.calls), is_final=is_final) if ends else read
        at = progress.at or first
        while True:
            start = skip_gap(text, at)
            if not text.startswith(marks.begin, start):
                return self._after_calls(text, at, calls, is_final=is_final)
            start += len(marks.begin)
            header = marks.header.match(text, start, start + _MAX_HEADER_CHARS)
            if header is None:
                is_open = not is_final and self._may_be_header(text[start:])
                return Segment(calls, None if is_open else at if calls else start)
            arguments = progress.scans.value(text, header.end())
            call = Call(header[header.lastindex or 1], progress.scans.escaped(text, header.end(), arguments.end))
            end = None if arguments.state == "open" else self._call_end(text, arguments.end, is_final=is_final)
            if end is None:
                return Segment([*calls, call], len(text) if is_final else None)
            calls.append(call)
            at = progress.at = end

    def _after_calls(self, text: str, at: int, calls: list[Call], *, is_final: bool) -> Segment:
        """Return what was read where no further call begins."""
        rest = text[skip_gap(text, at) :]
        if not is_final and (self._marks.begin.startswith(rest) or self._marks.end_calls.startswith(rest)):
            return Segment(calls)
        if not calls:
            return Segment(end=max(at, 1))
        return Segment(calls, after_mark(text, at, self._marks.end_calls, is_final))

    def _call_end(self, text: str, at: int, *, is_final: bool) -> int | None:
        """Return the place behind a call's last mark, or what there is of it; None: not clear yet."""
        after_fence = after_mark(text, at, _FENCE, is_final)
        return None if after_fence is None else after_mark(text, after_fence, self._marks.end, is_final)

    def _may_be_header(self, text: str) -> bool:
        return len(text) < _MAX_HEADER_CHARS and "{" not in text and self._marks.end not in text
