"""Forms of calls in tags: a name, then names and values of parameters, as GLM, MiniMax-M2 and Qwen3-Coder write them.

    <tool_call>search                                   <minimax:tool_call>
    <arg_key>query</arg_key>                            <invoke name="search">
    <arg_value>free text</arg_value>                    <parameter name="query">free text</parameter>
    </tool_call>                                        </invoke>
                                                        </minimax:tool_call>

Qwen3-Coder's is in qwen_coder.py. White space between tags may be left out. Arguments are told a parameter at a time,
as JSON of the type that the tool's schema names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .json_syntaxes import after_mark, find_first
from .parameter_types import arguments_of, typed
from .syntax import NAME, Call, Place, Progress, Schemas, Segment
from .values.json_text import GAP, dumps, skip_gap


@dataclass(slots=True, frozen=True)
class Part:
    """A part of a pattern, and what it may begin with where the text ends in it."""

    whole: str
    begun: str


def literal(text: str) -> Part:
    return Part(re.escape(text), _beginning(text))


def around(tag: str) -> Part:
    """Return the part of a tag around calls, which may be left out."""
    return Part(rf"(?:{tag}{GAP})?", _beginning(tag))


def _beginning(*texts: str) -> str:
    """Return the pattern of what one of these may begin with, not all of it."""
    return f"(?:{'|'.join(re.escape(text[:size]) for text in texts for size in range(len(text)))})"


@dataclass(slots=True, frozen=True)
class TagPattern:
    """Finds a sequence of parts, or what may become it."""

    whole: re.Pattern[str]
    begun: re.Pattern[str]  # of all that is left of a text

    @classmethod
    def of(cls, *parts: Part, other: str = "") -> TagPattern:
        """`other`: what may stand here instead."""
        before, options = "", [_beginning(other)] if other else []
        for part in parts:
            options.append(before + part.begun)
            before += part.whole
        return cls(re.compile(before), re.compile("|".join(options)))


@dataclass(slots=True, frozen=True)
class PairedForm:
    """A form says how one family writes calls."""

    places: tuple[str, ...]  # where one may begin
    head: TagPattern  # to a call's name, or further
    pair: TagPattern  # from a parameter's name to its value
    end_value: str
    end_call: str
    end_outer: str = ""  # of a tag around several calls
    more_marks: frozenset[str] = frozenset()


BLANK = Part(GAP, GAP)
CALL_NAME = Part(f"({NAME.pattern})", r"[A-Za-z0-9_.\-]{0,128}")


def _glm() -> PairedForm:
    tool, end, key, end_key, value, end_value = (
        *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"),
        *("<arg_value>", "</arg_value>"),
    )
    behind = Part(f"(?={key}|{end})", _beginning(key, end))
    named = Part(r"([^<>]{1,256})", r"[^<>]{0,256}")
    return PairedForm(
        places=(tool,),
        head=TagPattern.of(literal(tool), BLANK, CALL_NAME, BLANK, behind),
        pair=TagPattern.of(literal(key), named, literal(end_key), BLANK, literal(value), other=end),
        end_value=end_value,
        end_call=end,
        more_marks=frozenset({key, end_key, value, end_value}),
    )


def _minimax() -> PairedForm:
    outer, call, parameter, end = "<minimax:tool_call>", '<invoke name="', '<parameter name="', "</invoke>"
    named = Part(r'([^"<>\n]{1,256})', r'[^"<>\n]{0,256}')
    return PairedForm(
        places=(outer, call),
        head=TagPattern.of(around(outer), literal(call), CALL_NAME, literal('">')),
        pair=TagPattern.of(literal(parameter), named, literal('">'), other=end),
        end_value="</parameter>",
        end_call=end,
        end_outer="</minimax:tool_call>",
    )


GLM, MINIMAX = _glm(), _minimax()


class PairedSyntax:
    """Implements `Syntax`."""

    def __init__(self, form: PairedForm, schemas: Schemas) -> None:
        self._form, self._schemas = form, schemas
        self.marks = frozenset({*form.places[:1], form.end_outer or form.end_call}) | form.more_marks

    def find(self, text: str, *, is_start: bool) -> Place | None:
        """Find any tag that calls begin with: behind the first of an outer one there may be more."""
        return find_first(text, self._form.places)

    def read(self, text: str, progress: Progress, *, is_final: bool) -> Segment:
        form = self._form
        head = form.head.whole.match(text)
        if head is None:
            is_open = not is_final and form.head.begun.fullmatch(text) is not None
            begun = next((len(place) for place in form.places[:1] if text.startswith(place)), 1)
            return Segment() if is_open else Segment(end=begun)
        name, at, written = head[1], progress.at or head.end(), progress.written
        while True:
            start = skip_gap(text, at)
            if text.startswith(form.end_call, start):
                end = start + len(form.end_call)
                call = Call(name, arguments_of(written, "}"))
                return Segment((call,), after_mark(text, end, form.end_outer, is_final) if form.end_outer else end)
            if (pair := form.pair.whole.match(text, start)) is None:
                if not is_final and form.pair.begun.fullmatch(text, start) is not None:
                    return Segment((Call(name, arguments_of(written, "")),))
                return Segment((Call(name, arguments_of(written, "}")),), len(text) if start == len(text) else at)
            progress.inner = progress.inner or Progress()
            value, stop = self._value(text, pair, name, progress.inner, is_final=is_final)
            if stop is None and is_final:
                cut = f"{dumps(pair[1])}: {dumps(value)[:-1]}"  # a string without its end
                return Segment((Call(name, arguments_of([*written, cut], "")),), len(text))
            if stop is None:
                return Segment((Call(name, arguments_of(written, "")),))
            written.append(f"{dumps(pair[1])}: {typed(self._schemas, name, pair[1], value)}")
            at = progress.at = stop
            progress.inner = None

    def _value(
        self, text: str, tag: re.Match[str], tool: str, progress: Progress, *, is_final: bool
    ) -> tuple[str, int | None]:
        """Return a parameter's text and where it ends; None: not yet. `tag`: what names it, of a call of `tool`."""
        end = text.find(self._form.end_value, max(tag.end(), progress.at))
        if end < 0:
            progress.at = len(text) - len(self._form.end_value)
            return text[tag.end() :], None
        return text[tag.end() : end], end + len(self._form.end_value)
