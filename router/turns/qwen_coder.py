"""Qwen3-Coder's form of calls: tags for the function and for each of its parameters.

    <tool_call>
    <function=search>
    <parameter=query>
    free text
    </parameter>
    </function>
    </tool_call>

Seed-OSS writes the same with `<seed:tool_call>` around it. Arguments are told a parameter at a time, as JSON of the
type that the tool's schema names.
"""

from __future__ import annotations

import re
from collections.abc import Set

from .paired import CALL_NAME, PairedForm, PairedSyntax, Part, TagPattern, around, literal
from .parameter_types import properties_of
from .syntax import Progress, Schemas

_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
_PARAMETER_NAME = Part(r"([^<>\n]{1,256})", r"[^<>\n]{0,256}")


def _form(outer: str) -> PairedForm:
    return PairedForm(
        places=(f"<{outer}>", _FUNCTION),  # the outer tag is often left out
        head=TagPattern.of(around(f"<{outer}>"), literal(_FUNCTION), CALL_NAME, literal(">")),
        pair=TagPattern.of(literal(_PARAMETER), _PARAMETER_NAME, literal(">"), other=_END_FUNCTION),
        end_value=_END_PARAMETER,
        end_call=_END_FUNCTION,
        end_outer=f"</{outer}>",
    )


CODER, SEED = _form("tool_call"), _form("seed:tool_call")
_NEXT_PARAMETER, _NEXT_END = f"\n{_PARAMETER}", f"\n{_END_FUNCTION}"
_LITTLE_BLANK = re.compile(r"\s{0,64}+")
_LINE_CHARS = 300  # of what such a line is known by: a name of a parameter at most, or an end, white space and an end


class QwenCoderSyntax(PairedSyntax):
    def __init__(self, schemas: Schemas, form: PairedForm = CODER) -> None:
        super().__init__(form, schemas)

    def _value(
        self, text: str, tag: re.Match[str], tool: str, progress: Progress, *, is_final: bool
    ) -> tuple[str, int | None]:
        """Return what it does elsewhere. One line break on either side is the form's.

        Where its end is left out, it ends before the tag of another of the tool's parameters, or before the call's end.
        """
        looked = max(tag.end(), progress.at)
        closing = text.find(_END_PARAMETER, looked)
        stop = closing if closing >= 0 else len(text)
        others = properties_of(self._schemas, tool).keys() - {tag[1]}
        ends = [
            end
            for mark in (_NEXT_PARAMETER, _NEXT_END)
            if (end := self._find_line(text, mark, looked, stop, others, is_final=is_final)) is not None
        ]
        if ends:
            return text[tag.end() : min(ends)].removeprefix("\n"), min(ends)
        progress.at = len(text) - _LINE_CHARS
        value = text[tag.end() : stop].removeprefix("\n")
        return (value, None) if closing < 0 else (value.removesuffix("\n"), closing + len(_END_PARAMETER))

    def _find_line(self, text: str, mark: str, at: int, stop: int, others: Set[str], *, is_final: bool) -> int | None:
        """Find a line between these places that begins with a tag of the form, and is none of a value's."""
        while (at := text.find(mark, at, stop)) >= 0:
            tag = self._form.pair.whole.match(text, at + 1)
            behind = _LITTLE_BLANK.match(text, at + len(mark))
            assert behind is not None
            is_last = text.startswith(self._form.end_outer, behind.end()) or (is_final and behind.end() == len(text))
            if (mark == _NEXT_END and is_last) or (tag is not None and tag[1] in others):
                return at
            at += 1
        return None
