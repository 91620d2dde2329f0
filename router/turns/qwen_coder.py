"""Qwen3-Coder's form of calls: tags for the function and for each of its parameters.

    <tool_call>
    <function=search>
    <parameter=query>
    free text
    </parameter>
    </function>
    </tool_call>

Arguments are told a parameter at a time, as JSON of the type that the tool's schema names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set

from .json_syntaxes import after_mark, find_first
from .json_text import dumps, skip_blank
from .parameter_types import arguments_of, typed
from .syntax import Call, Place, Progress, Schemas, Segment

_TOOL, _END_TOOL = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"(?:<tool_call>\s*+)?<function=([A-Za-z0-9_.\-]{1,128})>")
_BEGIN = "<function="
_BEGUN = re.compile(r"<function=[A-Za-z0-9_.\-]{0,128}")
_PARAMETER = re.compile(r"<parameter=([^<>\n]{1,256})>")
_END_FUNCTION, _END_PARAMETER = "</function>", "</parameter>"
_NEXT_PARAMETER, _NEXT_END = "\n<parameter=", f"\n{_END_FUNCTION}"
_LITTLE_BLANK = re.compile(r"\s{0,64}+")
_LINE_CHARS = 300  # of what such a line is known by: a name of a parameter at most, or an end, white space and an end


class QwenCoderSyntax:
    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self.marks = frozenset({_TOOL, _END_TOOL})

    def find(self, text: str, *, is_start: bool) -> Place | None:
        """Find either tag: the outer one is often left out."""
        return find_first(text, (_TOOL, _BEGIN))

    def read(self, text: str, progress: Progress, *, is_final: bool) -> Segment:
        function = _FUNCTION.match(text)
        if function is None:
            is_open = not is_final and _may_begin(text)
            return Segment() if is_open else Segment(end=len(_TOOL) if text.startswith(_TOOL) else 1)
        name, at, written = function[1], progress.at or function.end(), progress.written
        while True:
            start = skip_blank(text, at)
            if (parameter := _PARAMETER.match(text, start)) is not None:
                properties = self._schemas.get(name, {}).get("properties")
                progress.inner = progress.inner or Progress()
                value, end = _value(text, parameter, properties, progress.inner, is_final=is_final)
                if end is None:
                    if is_final:
                        cut = f"{dumps(parameter[1])}: {dumps(value)[:-1]}"  # a string without its end
                        return Segment((Call(name, arguments_of([*written, cut], "")),), len(text))
                    return Segment((Call(name, arguments_of(written, "")),))
                written.append(f"{dumps(parameter[1])}: {typed(self._schemas, name, parameter[1], value)}")
                at = progress.at = end
                progress.inner = None
            elif text.startswith(_END_FUNCTION, start):
                call = Call(name, arguments_of(written, "}"))
                end = after_mark(text, start + len(_END_FUNCTION), _END_TOOL, is_final)
                return Segment((call,), end)
            elif not is_final and _may_go_on(text[start:]):
                return Segment((Call(name, arguments_of(written, "")),))
            else:
                return Segment((Call(name, arguments_of(written, "}")),), len(text) if start == len(text) else at)


def _value(
    text: str, tag: re.Match[str], properties: object, progress: Progress, *, is_final: bool
) -> tuple[str, int | None]:
    """Return a parameter's text and where it ends; None: not yet. One line break on either side is the form's.

    Where its end is left out, it ends before the tag of another of the tool's parameters, or before the call's end.
    """
    start = tag.end()
    looked = max(start, progress.at)
    closing = text.find(_END_PARAMETER, looked)
    stop = closing if closing >= 0 else len(text)
    others = properties.keys() - {tag[1]} if isinstance(properties, Mapping) else set[str]()
    ends = [
        end
        for mark in (_NEXT_PARAMETER, _NEXT_END)
        if (end := _find_line(text, mark, looked, stop, others, is_final=is_final)) is not None
    ]
    if ends:
        return text[start : min(ends)].removeprefix("\n"), min(ends)
    progress.at = len(text) - _LINE_CHARS
    value = text[start:stop].removeprefix("\n")
    return (value, None) if closing < 0 else (value.removesuffix("\n"), closing + len(_END_PARAMETER))


def _find_line(text: str, mark: str, at: int, stop: int, others: Set[str], *, is_final: bool) -> int | None:
    """Find a line between these places that begins with a tag of the form, and is none of a value's."""
    while (at := text.find(mark, at, stop)) >= 0:
        tag = _PARAMETER.match(text, at + 1)
        behind = _LITTLE_BLANK.match(text, at + len(mark))
        assert behind is not None
        is_last = text.startswith(_END_TOOL, behind.end()) or (is_final and behind.end() == len(text))
        if (mark == _NEXT_END and is_last) or (tag is not None and tag[1] in others):
            return at
        at += 1
    return None


def _may_begin(text: str) -> bool:
    """Return whether this may become a function's tag."""
    rest = text[skip_blank(text, len(_TOOL)) :] if text.startswith(_TOOL) else text
    return _BEGIN.startswith(rest) or _BEGUN.fullmatch(rest) is not None


def _may_go_on(rest: str) -> bool:
    """Return whether a tag of the form may come of what stands here."""
    if rest.startswith("<parameter="):
        return ">" not in rest and "\n" not in rest and len(rest) < 300
    return any(tag.startswith(rest) for tag in ("<parameter=", _END_FUNCTION))
