"""gpt-oss's turns: messages one after the other, each in a channel (OpenAI's "harmony" form).

    <|channel|>analysis<|message|> thoughts <|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|> arguments of a call <|call|>
    <|start|>assistant<|channel|>final<|message|> the answer <|return|>

A prompt ends behind the role of a message, so an answer begins in a header. In `commentary` a model also says what
somebody is to read before it calls. `to=` may stand on either side of the channel. What is sent to tools that the
request has not got (`python`, `browser.search`) is none of the answer: it is told with the thoughts. A text that does
not begin as a header is the answer. What comes out does not depend on how the text is cut.
"""

from __future__ import annotations

import re
from collections.abc import Set
from typing import Literal

from .parts import CallPiece, Part, Thought, TurnDelta
from .values.json_text import ends_with_part_of

CHANNEL, MESSAGE, START, END = "<|channel|>", "<|message|>", "<|start|>", "<|end|>"
_ENDS = (END, "<|call|>", "<|return|>", START, CHANNEL)  # of a body; the last two where a model forgets them
MARKS = frozenset({*_ENDS, MESSAGE, "<|constrain|>"})
OPENING = f"{CHANNEL}final{MESSAGE}"  # behind the prompt of an answer that is calls, in a form of our own

_FIRST = (CHANNEL, START, MESSAGE, "to=")  # what a header begins with
_MAX_HEADER_CHARS = 512  # a longer one is text: names have at most 64 characters
_END = re.compile("|".join(map(re.escape, _ENDS)))
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_LEADING = re.compile(r"\s*(?:<\|start\|>|<\|channel\|>)*")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_FUNCTIONS = "functions."

Kind = Literal["header", "thought", "text", "call"]


class ChannelReader:
    """The state of one choice. Implements `TurnReader`."""

    is_plain = False

    def __init__(self, names: Set[str] = frozenset(), *, has_one_call: bool = False) -> None:
        """`names`: of the tools that may be called; none: nothing is a call."""
        self._names = names
        self._has_one_call = has_one_call
        self._rest = ""  # held back: a header, a part of a mark, or white space that may end a call's arguments
        self._is_first = True  # nothing shows yet whether the answer is in channels
        self._name = ""  # of the function that is called
        self._num_calls = self._num_ended = 0
        self._has_arguments = False
        self._told = set[Kind]()
        self._separator = ""  # before what comes next of the present message
        self.kind: Kind = "header"
        self._was_beside = False  # what came last may have ended a header, a thought or a call

    @property
    def has_called(self) -> bool:
        return self._num_calls > 0

    @property
    def is_beside_text(self) -> bool:
        return self._is_beside or self._was_beside

    @property
    def is_unclear(self) -> bool:
        return bool(self._rest) and not self._is_beside

    @property
    def _is_beside(self) -> bool:
        return self.kind in ("call", "thought") or (self.kind == "header" and not self._is_first)

    def push(self, text: str, *, is_final: bool = False) -> TurnDelta:
        """Take what comes next; the last text is final."""
        self._was_beside = self._is_beside
        self._rest += text
        delta = TurnDelta()
        while self._begin(is_final=is_final) if self.kind == "header" else self._go_on(delta, is_final=is_final):
            pass
        delta.ends_call = self._num_ended > 0
        return delta

    # --- headers --------------------------------------------------------------------------------------------

    def _begin(self, *, is_final: bool) -> bool:
        """Read the header of a message; False: it is not whole."""
        if self._is_first:
            text = self._rest.lstrip()
            if not text.startswith(_FIRST):
                if not is_final and any(mark.startswith(text) for mark in _FIRST):
                    return False
                self._enter("text")
                return bool(self._rest)
            self._is_first = False
        at = self._rest.find(MESSAGE, 0, _MAX_HEADER_CHARS)
        if at >= 0:
            header, self._rest = self._rest[:at], self._rest[at + len(MESSAGE) :]
            self._enter(self._kind_of(header))
        elif len(self._rest) >= _MAX_HEADER_CHARS:
            self._rest = _LEADING.sub("", self._rest, count=1)
            self._enter("text")
        return self.kind != "header"

    def _kind_of(self, header: str) -> Kind:
        recipient = _RECIPIENT.search(header)
        if recipient is not None:
            name = recipient[1].removeprefix(_FUNCTIONS)
            if self._names and (name in self._names or recipient[1].startswith(_FUNCTIONS)):
                self._name = name
                return "call"
            return "thought"
        channel = _CHANNEL.search(header)
        return "thought" if channel is not None and channel[1] == "analysis" else "text"

    def _enter(self, kind: Kind) -> None:
        self.kind, self._is_first, self._has_arguments = kind, False, False
        self._separator = "\n" if kind in self._told else ""

    # --- bodies ---------------------------------------------------------------------------------------------

    def _go_on(self, delta: TurnDelta, *, is_final: bool) -> bool:
        """Tell what is there of a message; False: it goes on."""
        if self.kind == "call" and self._name:
            delta.parts += self._call(self._name, "")
            self._name = ""
        found = _END.search(self._rest)
        if found is not None:
            text, is_over = self._rest[: found.start()], True
            self._rest = self._rest[found.start() if found[0] in (START, CHANNEL) else found.end() :]
        elif is_final:
            text, self._rest, is_over = self._rest, "", True
        else:
            held = max(ends_with_part_of(self._rest, mark) for mark in _ENDS)
            text, is_over = self._rest[: len(self._rest) - held], False
            if self.kind == "call":
                text = text.rstrip()
            self._rest = self._rest[len(text) :]
        self._tell(text.rstrip() if self.kind == "call" else text, delta)
        if not is_over:
            return False
        self._num_ended += self.kind == "call"
        self.kind = "header"
        return bool(self._rest)

    def _tell(self, text: str, delta: TurnDelta) -> None:
        if self.kind == "call" and not self._has_arguments:
            text = text.lstrip()
            self._has_arguments = bool(text)
        if not text:
            return
        if self.kind == "call":
            delta.parts += self._call(None, text)
            return
        text, self._separator = self._separator + text, ""
        self._told.add(self.kind)
        delta.parts.append(Thought(text) if self.kind == "thought" else text)

    def _call(self, name: str | None, arguments: str) -> list[Part]:
        if name is not None:
            self._num_calls += 1
        index = self._num_calls - 1
        return [] if self._has_one_call and index > 0 else [CallPiece(index, name, arguments)]


class ChannelCount:
    """A count of one choice's tokens that are thoughts, the headers before them and the marks behind them included."""

    def __init__(self) -> None:
        self._reader = ChannelReader()
        self._seen = 0
        self._open = 0  # tokens of a header
        self.num_tokens = 0

    def push(self, text: str, num_tokens: int) -> None:
        """Take the text of one more token; `num_tokens`: the choice's, with it."""
        self._open += num_tokens - self._seen
        self._seen = num_tokens
        before = self._reader.kind
        self._reader.push(text)
        kind = self._reader.kind if before == "header" else before
        if kind != "header":
            self.num_tokens += self._open if kind == "thought" else 0
            self._open = 0
