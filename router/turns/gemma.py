"""Gemma 4's form of calls: one behind the other, each between marks, its arguments in a form of their own.

    <|tool_call>call:search{limit:2,query:<|"|>free text<|"|>}<tool_call|>

Arguments are told as JSON while they are being written (values/gemma_text.py).
"""

from __future__ import annotations

from collections.abc import Set

from .json_syntaxes import after_mark, find_mark
from .paired import BLANK, CALL_NAME, Part, TagPattern, literal
from .parameter_types import parameter_kinds, properties_of
from .syntax import Call, Place, Progress, Schemas, Segment, Tags
from .values.gemma_text import END_CALL, MARK, ArgumentsWalk

BEGIN_CALL = "<|tool_call>"
GEMMA_TAGS = Tags(BEGIN_CALL, END_CALL)
_BRACE = Part(r"(?=\{)", "")
_HEAD = TagPattern.of(literal(BEGIN_CALL), BLANK, literal("call:"), BLANK, CALL_NAME, BLANK, _BRACE)


class GemmaSyntax:
    """Implements `Syntax`."""

    marks = frozenset({BEGIN_CALL, END_CALL, MARK})

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas

    def find(self, text: str, *, is_start: bool) -> Place | None:
        return find_mark(text, BEGIN_CALL)

    def read(self, text: str, progress: Progress, *, is_final: bool) -> Segment:
        no_call = Segment(end=len(BEGIN_CALL))
        if (head := _HEAD.whole.match(text)) is None:
            is_open = not is_final and _HEAD.begun.fullmatch(text) is not None
            return Segment() if is_open else no_call
        walk = progress.arguments = progress.arguments or ArgumentsWalk(head.end(), self._texts(head[1]))
        walk.go_on(text)
        if not walk.has_shown:
            return Segment() if walk.state == "open" and not is_final else no_call
        call = Call(head[1], walk.written)
        if walk.state == "open":
            return Segment((call,), len(text) if is_final else None)
        return Segment((call,), after_mark(text, walk.at, END_CALL, is_final))

    def _texts(self, tool: str) -> Set[str]:
        """Return the parameters that can be nothing but texts."""
        names = properties_of(self._schemas, tool)
        return {name for name in names if parameter_kinds(self._schemas, tool, name) == {"string"}}
