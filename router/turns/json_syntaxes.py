"""The forms of calls that are JSON: of Hermes and Qwen, Mistral, Llama 3, Granite 3, Command, and JSON alone."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping

from .syntax import (
    NAME,
    Call,
    NameCheck,
    Place,
    Progress,
    Segment,
    Syntax,
    Tags,
    first_place,
    is_any_name,
    read_json_calls,
)
from .values.json_text import GAP, SEPARATOR, ends_with_part_of, skip_blank, skip_gap

HERMES_TAGS = Tags("<tool_call>", "</tool_call>")
NEMOTRON_TAGS = Tags("<TOOLCALL>", "</TOOLCALL>")  # of Nemotron Nano 2, around an array of all calls
LLAMA_TAGS: Mapping[str, str] = {"<|python_tag|>": ""}
# Of Granite 3.0 and 3.3, of 3.1 and 3.2, of Phi-4-mini as it was trained and as vLLM's template tells it.
GRANITE_TAGS: Mapping[str, str] = {"<|tool_call|>": "<|/tool_call|>", "<tool_call>": "</tool_call>", "functools": ""}
COMMAND_TAGS: Mapping[str, str] = {"<|START_ACTION|>": "<|END_ACTION|>"}  # of Command R7B and A
_JSON_BEGINS = ("{", "[", "`")  # or a fence around it
_NO_TAGS: Mapping[str, str] = {}
_FENCE = re.compile(rf"```(?:json)?+{GAP}(?=[{{\[])")
_MAYBE_FENCE = re.compile(rf"(?:`{{1,2}}|```(?:j(?:s(?:on?)?)?)?{GAP})?")


def find_mark(text: str, mark: str) -> Place | None:
    """Find `mark`, or what may become it at the text's end."""
    start = text.find(mark)
    if start >= 0:
        return Place(start, is_sure=True)
    size = ends_with_part_of(text, mark)
    return Place(len(text) - size, is_sure=False) if size else None


def find_first(text: str, marks: Iterable[str]) -> Place | None:
    """Find the first of several marks."""
    return first_place(find_mark(text, mark) for mark in marks)


class HermesSyntax:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, once for each call, or of an array of them.

    Models forget the tags between several calls, write an array, or put a fence of Markdown inside.
    """

    def __init__(self, tags: Tags = HERMES_TAGS) -> None:
        self._tags = tags
        self.marks = frozenset(tags)

    def find(self, text: str, *, is_start: bool) -> Place | None:
        return find_mark(text, self._tags.begin)

    def read(self, text: str, progress: Progress, *, is_final: bool) -> Segment:
        begin, end_tag = self._tags
        at = skip_gap(text, len(begin))
        fence = _FENCE.match(text, at)
        at = at if fence is None else fence.end()
        if not is_final and _MAYBE_FENCE.fullmatch(text, at) is not None:
            return Segment()
        if at == len(text) or text[at] not in "{[":
            return Segment(end=len(begin))
        read = read_several(text, at, is_any_name, progress, is_final=is_final)
        if not read.calls or read.end is None:
            return read
        end = read.end if fence is None else after_mark(text, read.end, "```", is_final)
        return Segment(read.calls, None if end is None else after_mark(text, end, end_tag, is_final))


class EitherSyntax:
    """Hermes' form (told.py tells it), and another one that an operator has named."""

    def __init__(self, own: Syntax) -> None:
        self._own, self._told = own, HermesSyntax()
        self.marks = own.marks | self._told.marks

    def find(self, text: str, *, is_start: bool) -> Place | None:
        return first_place(syntax.find(text, is_start=is_start) for syntax in (self._own, self._told))

    def read(self, text: str, progress: Progress, *, is_final: bool) -> Segment:
        """Read it as Hermes' where JSON follows the tag, which Qwen3-Coder's form and GLM's begin with, too."""
        if not text.startswith(HERMES_TAGS.begin):
            return self._own.read(text, progress, is_final=is_final)
        at = skip_gap(text, len(HERMES_TAGS.begin))
        if at == len(text) and not is_final:
            return Segment()
        syntax = self._told if text.startswith(_JSON_BEGINS, at) else self._own
        return syntax.read(text, progress, is_final=is_final)


def read_several(text: str, at: int, is_name: NameCheck, progress: Progress, *, is_final: bool) -> Segment:
    """Read calls, or arrays of them, one behind the other; Llama writes semicolons between them."""
    calls = progress.calls
    at = progress.at or at
    while True:
        progress.inner = progress.inner or Progress()
        read = read_json_calls(text, at, is_name, progress.inner, is_final=is_final)
        if not read.calls or read.end is None:
            return Segment([*calls, *read.calls], at if calls and read.end is not None else read.end)
        separator = SEPARATOR.match(text, read.end)
        assert separator is not None
        after = separator.end()
        if after == len(text) or text[after] != "{":
            return Segment([*calls, *read.calls], read.end if after < len(text) or is_final else None)
        calls += read.calls
        progress.inner, progress.at = None, after
        at = after


def after_mark(text: str, at: int, mark: str, is_final: bool) -> int | None:
    """Return the place after white space and `mark`; `at` where something else stands there, None: not clear yet."""
    start = skip_gap(text, at)
    if text.startswith(mark, start):
        return start + len(mark)
    if mark.startswith(text[start:]):
        return len(text) if is_final else None
    return at


class MistralSyntax:
    """`[TOOL_CALLS]` before an array of calls; with newer models before a name and its arguments, for each call."""

    BEGIN = "[TOOL_CALLS]"
    marks = frozenset({BEGIN, "[ARGS]", "[CALL_ID]"})
    _ID = r"[A-Za-z0-9]{0,128}+"
    _NAMED = re.compile(rf"{GAP}({NAME.pattern})(?:\[CALL_ID\]{_ID})?(?:\[ARGS\])?{GAP}(?=\{{)")
    _MAYBE_NAMED = re.compile(
        rf"{GAP}[A-Za-z0-9_.\-]{{0,128}}(?:\[[A-Z_]{{0,7}}+(?:\]{_ID})?+(?:\[[A-Z]{{0,4}}+\]?+)?)?{GAP}"
    )

    def find(self, text: str, *, is_start: bool) -> Place | None:
        return find_mark(text, self.BEGIN)

    def read(self, text: str, progress: Progress, *, is_final: bool) -> Segment:
        at = skip_gap(text, len(self.BEGIN))
        if at < len(text) and text[at] in "[{":
            return read_json_calls(text, at, is_any_name, progress, is_final=is_final)
        named = self._NAMED.match(text, len(self.BEGIN))
        if named is not None:
            arguments = progress.scans.value(text, named.end())
            end = None if arguments.state == "open" and not is_final else arguments.end
            written = progress.scans.escaped(text, named.end(), arguments.end)
            return Segment((Call(named[1], written),), end)
        maybe = self._MAYBE_NAMED.match(text, len(self.BEGIN))
        if maybe is not None and maybe.end() == len(text) and not is_final:
            return Segment()
        return Segment(end=len(self.BEGIN))


class BareJsonSyntax:
    """A call's object, or an array of them, and nothing before: only of tools that there are.

    `tags` are what a model may put before it, wherever it stands (Llama's `<|python_tag|>`), and then behind it.
    """

    def __init__(self, names: Container[str], tags: Mapping[str, str] = _NO_TAGS) -> None:
        self._names = names
        self._tags = tags
        self.marks = frozenset({*tags, *tags.values()} - {""})

    def find(self, text: str, *, is_start: bool) -> Place | None:
        start = skip_blank(text, 0)
        if is_start and (start == len(text) or text[start] in "{["):
            return Place(start, is_sure=start < len(text))
        return find_first(text, self._tags)

    def read(self, text: str, progress: Progress, *, is_final: bool) -> Segment:
        tag = next((tag for tag in self._tags if text.startswith(tag)), "")
        at = skip_gap(text, len(tag))
        if at == len(text):
            return Segment(end=at) if is_final else Segment()
        if text[at] not in "{[":
            return Segment(end=max(at, 1))
        read = read_several(text, at, self._names.__contains__, progress, is_final=is_final)
        end = self._tags.get(tag)
        if not end or not read.calls or read.end is None:
            return read
        return Segment(read.calls, after_mark(text, read.end, end, is_final))
