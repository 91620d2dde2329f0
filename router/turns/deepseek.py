"""DeepSeek's forms of calls: marks of its own around all of them, around each, and between a call's parts.

    V3, R1   <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>search
             ```json
             {"query": "x"}
             ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
    V3.1     <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>search<｜tool▁sep｜>{"query": "x"}<｜tool▁call▁end｜>
             <｜tool▁calls▁end｜>

Both are read, whatever the model's version: one may be told of the other's form.
"""

from __future__ import annotations

import re

from .json_syntaxes import after_mark, find_first
from .json_text import skip_blank
from .syntax import NAME, Call, Place, Progress, Segment

BEGIN_CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_BEGIN, _SEPARATOR, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_FENCE = "```"
_NAME = rf"\s*+({NAME.pattern})"
_HEADER = re.compile(rf"{_NAME}\s*+{_SEPARATOR}(?:{_NAME})?+\s*+(?:```(?:json)?+\s*+)?+(?=\{{)")
_MAX_HEADER_CHARS = 512  # a longer one is text: names have at most 64 characters


class DeepSeekSyntax:
    marks = frozenset({BEGIN_CALLS, END_CALLS, _BEGIN, _SEPARATOR, _END})

    def find(self, text: str, *, is_start: bool) -> Place | None:
        """Find either mark: the outer one is left out now and then."""
        return find_first(text, (BEGIN_CALLS, _BEGIN))

    def read(self, text: str, progress: Progress, *, is_final: bool) -> Segment:
        calls = progress.calls
        at = progress.at or (len(BEGIN_CALLS) if text.startswith(BEGIN_CALLS) else 0)
        while True:
            start = skip_blank(text, at)
            if not text.startswith(_BEGIN, start):
                return _after_calls(text, at, calls, is_final=is_final)
            start += len(_BEGIN)
            header = _HEADER.match(text, start)
            if header is None:
                is_open = not is_final and _may_be_header(text[start:])
                return Segment(calls, None if is_open else at if calls else start)
            arguments = progress.scans.value(text, header.end())
            call = Call(header[2] or header[1], progress.scans.escaped(text, header.end(), arguments.end))
            end = None if arguments.state == "open" else _call_end(text, arguments.end, is_final=is_final)
            if end is None:
                return Segment([*calls, call], len(text) if is_final else None)
            calls.append(call)
            at = progress.at = end


def _after_calls(text: str, at: int, calls: list[Call], *, is_final: bool) -> Segment:
    """Return what was read where no further call begins."""
    rest = text[skip_blank(text, at) :]
    if not is_final and (_BEGIN.startswith(rest) or END_CALLS.startswith(rest)):
        return Segment(calls)
    if not calls:
        return Segment(end=max(at, 1))
    return Segment(calls, after_mark(text, at, END_CALLS, is_final))


def _call_end(text: str, at: int, *, is_final: bool) -> int | None:
    """Return the place behind a call's last mark, or what there is of it; None: not clear yet."""
    after_fence = after_mark(text, at, _FENCE, is_final)
    return None if after_fence is None else after_mark(text, after_fence, _END, is_final)


def _may_be_header(text: str) -> bool:
    return len(text) < _MAX_HEADER_CHARS and "{" not in text and _END not in text
