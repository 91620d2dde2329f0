r"""One choice's text on its way to content and calls, as a stream tells them.

    text ─> content (as it comes) │ a segment of calls ─> name, pieces of arguments │ content ...

A segment is read anew from its beginning at each piece, and the difference to what was told is told. So the pieces
joined are the same for every way to cut the text. White space before a call, and between the last call and the end,
belongs to the calls' form and is left out; all other text is told.

Arguments are told by whole characters, since some clients parse each beginning of them, and no half of one is told,
which strict parsers refuse:

    \ud83d ─> held back ─> \ud83d\ude00       a character, in one piece
                        └> ?                   half of one
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .parts import CallPiece, TurnDelta
from .syntax import Call, Progress, Segment, Syntax

_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_OPEN = r"\\(?:u[0-9a-fA-F]{0,3})?\Z"  # an escape that may go on
# What no later piece changes. Possessive: one pass.
_SETTLED = re.compile(
    rf"(?:[^\\]++|{_HIGH}{_LOW}|{_HIGH}(?!\Z|{_OPEN})|(?!{_HIGH}|{_OPEN})\\(?:u[0-9a-fA-F]{{4}}|.))*+", re.DOTALL
)
_ESCAPE = re.compile(rf"{_HIGH}{_LOW}|({_HIGH}|{_LOW})|\\.", re.DOTALL)


class CallReader:
    """The state of one choice."""

    def __init__(self, syntax: Syntax) -> None:
        self._syntax = syntax
        self._rest = ""  # text from the first place on of which not all is told
        self._is_in_segment = False  # `_rest` begins with one
        self._told: list[Call] = []  # this segment's calls, as far as they were told
        self._progress = Progress()  # in this segment
        self._num_before = 0  # calls of the segments before
        self._blank = ""  # white space that may be a call's
        self._is_start = True
        self._is_after_call = False
        self._num_passed = 0  # characters before `_rest`
        self.calls_at: int | None = None  # where the calls begin that no content follows

    @property
    def has_finished(self) -> bool:
        """Nothing more belongs to the first call."""
        return self._num_before > 0 or len(self._told) > 1

    @property
    def num_clear(self) -> int:
        """The characters at the text's beginning that nothing which comes can make a part of calls at its end."""
        return self._num_passed if self.calls_at is None else self.calls_at

    @property
    def is_inside(self) -> bool:
        """A call is being written: its name is told, or the mark before it stands."""
        return self._is_in_segment and (bool(self._told) or self._rest.startswith(tuple(self._syntax.marks)))

    @property
    def is_unclear(self) -> bool:
        """The last text may be a call's beginning, or none."""
        return bool(self._rest) and not self.is_inside

    def push(self, text: str, *, is_final: bool = False) -> TurnDelta:
        """Take what comes next; the last text is final."""
        delta = TurnDelta()
        if not text and not is_final:
            return delta
        self._rest += text
        while self._advance(delta, is_final=is_final):
            pass
        if is_final and not self._is_after_call:
            delta.say(self._blank)
        return delta

    def _advance(self, delta: TurnDelta, *, is_final: bool) -> bool:
        """Read to the next border; False: not there yet."""
        if not self._is_in_segment:
            return self._find(delta, is_final=is_final)
        segment = self._syntax.read(self._rest, self._progress, is_final=is_final)
        self._tell(segment, delta)
        if segment.end is None:
            assert not is_final
            return False
        passed, self._rest = self._rest[: segment.end], self._rest[segment.end :]
        self._num_passed += len(passed)
        if segment.calls:
            self._num_before += len(segment.calls)
            self._told, self._is_after_call = [], True
        else:
            self._say(passed, delta)
        self._is_in_segment, self._progress = False, Progress()
        return bool(self._rest)

    def _find(self, delta: TurnDelta, *, is_final: bool) -> bool:
        place = self._syntax.find(self._rest, is_start=self._is_start)
        start = len(self._rest) if place is None or (is_final and not place.is_sure) else place.start
        self._say(self._rest[:start], delta)
        self._rest = self._rest[start:]
        self._num_passed += start
        self._is_in_segment = place is not None and place.is_sure
        return self._is_in_segment

    def _tell(self, segment: Segment, delta: TurnDelta) -> None:
        for index in range(max(0, len(self._told) - 1), len(segment.calls)):  # those before are over
            call = segment.calls[index]
            number = self._num_before + index
            if index == len(self._told):
                delta.parts.append(CallPiece(number, call.name, call.arguments))
                self._told.append(call)
                self._blank, self._is_start = "", False
                self.calls_at = self._num_passed if self.calls_at is None else self.calls_at
            elif len(call.arguments) > len(told := self._told[index].arguments):
                delta.parts.append(CallPiece(number, None, call.arguments[len(told) :]))
                self._told[index] = call

    def _say(self, text: str, delta: TurnDelta) -> None:
        text = self._blank + text
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        if shown:
            delta.say(shown)
            self._is_start = self._is_after_call = False
            self.calls_at = None


class Arguments:
    """The arguments of one call, on their way to the client."""

    def __init__(self) -> None:
        self._held = ""  # begins at an escape

    def push(self, text: str) -> str:
        """Take more of them, and return what can be told."""
        text = self._held + text
        settled = _SETTLED.match(text)
        assert settled is not None
        self._held = text[settled.end() :]
        return _mended(settled[0])

    def end(self) -> str:
        """Return what was held back."""
        rest, self._held = self._held, ""
        return _mended(rest)


def _mended(text: str) -> str:
    return _ESCAPE.sub(lambda found: "?" if found[1] else found[0], text)


def joined_calls(pieces: Sequence[CallPiece]) -> list[Call]:
    calls: list[Call] = []
    for piece in pieces:
        if piece.name is not None:
            assert piece.index == len(calls)
            calls.append(Call(piece.name, piece.arguments))
        else:
            told = calls[piece.index]
            calls[piece.index] = Call(told.name, told.arguments + piece.arguments)
    return calls
