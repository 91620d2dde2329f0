"""GLM's form of calls (4.5 and later): a name, then the keys and values of its arguments, each in tags.

    <tool_call>search
    <arg_key>query</arg_key>
    <arg_value>free text</arg_value>
    </tool_call>

Line breaks between tags may be left out. Arguments are told one at a time, as JSON of the type that the tool's schema
names.
"""

from __future__ import annotations

import re

from .json_syntaxes import find_first
from .json_text import dumps, skip_blank
from .parameter_types import arguments_of, typed
from .syntax import Call, Place, Progress, Schemas, Segment

_TOOL, _END_TOOL = "<tool_call>", "</tool_call>"
_KEY, _END_KEY = "<arg_key>", "</arg_key>"
_VALUE, _END_VALUE = "<arg_value>", "</arg_value>"
_HEAD = re.compile(rf"{_TOOL}\s*+([A-Za-z0-9_.\-]{{1,128}})\s*+(?={_KEY}|{_END_TOOL})")
_BEGUN = re.compile(rf"{_TOOL}\s*+(?:[A-Za-z0-9_.\-]{{1,128}})?+\s*+(<[a-z_/]*+)?")
_PAIR = re.compile(rf"{_KEY}([^<>]{{1,256}}){_END_KEY}\s*+{_VALUE}")
_MAX_KEY = 256


class GlmSyntax:
    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self.marks = frozenset({_TOOL, _END_TOOL, _KEY, _END_KEY, _VALUE, _END_VALUE})

    def find(self, text: str, *, is_start: bool) -> Place | None:
        return find_first(text, (_TOOL,))

    def read(self, text: str, progress: Progress, *, is_final: bool) -> Segment:
        head = _HEAD.match(text)
        if head is None:
            is_open = not is_final and _may_begin(text)
            return Segment() if is_open else Segment(end=min(len(_TOOL), len(text)))
        name, at, written = head[1], progress.at or head.end(), progress.written
        while True:
            start = skip_blank(text, at)
            if text.startswith(_END_TOOL, start):
                return Segment((Call(name, arguments_of(written, "}")),), start + len(_END_TOOL))
            if (pair := _PAIR.match(text, start)) is None:
                if not is_final and _may_go_on(text[start:]):
                    return Segment((Call(name, arguments_of(written, "")),))
                return Segment((Call(name, arguments_of(written, "}")),), len(text) if start == len(text) else at)
            progress.inner = progress.inner or Progress()
            end = text.find(_END_VALUE, max(pair.end(), progress.inner.at))
            if end < 0 and is_final:
                cut = f"{dumps(pair[1])}: {dumps(text[pair.end() :])[:-1]}"  # a string without its end
                return Segment((Call(name, arguments_of([*written, cut], "")),), len(text))
            if end < 0:
                progress.inner.at = len(text) - len(_END_VALUE)
                return Segment((Call(name, arguments_of(written, "")),))
            value = typed(self._schemas, name, pair[1], text[pair.end() : end])
            written.append(f"{dumps(pair[1])}: {value}")
            at = progress.at = end + len(_END_VALUE)
            progress.inner = None


def _may_begin(text: str) -> bool:
    """Return whether this may become a call's name and what follows it."""
    begun = _BEGUN.fullmatch(text)
    if begun is None:
        return _TOOL.startswith(text)
    return begun[1] is None or any(tag.startswith(begun[1]) for tag in (_KEY, _END_TOOL))


def _may_go_on(rest: str) -> bool:
    """Return whether a key and its value, or the call's end, may come of what stands here."""
    if not rest.startswith(_KEY):
        return any(tag.startswith(rest) for tag in (_KEY, _END_TOOL))
    key, tag, behind = rest.removeprefix(_KEY).partition("<")
    if ">" in key or len(key) > _MAX_KEY:
        return False
    closing = tag + behind
    if not closing.startswith(_END_KEY):
        return bool(key) and _END_KEY.startswith(closing) if tag else True
    return bool(key) and _VALUE.startswith(closing.removeprefix(_END_KEY).lstrip())
