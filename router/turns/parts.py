"""The parts of a turn: what a model thinks, says and calls, as pieces of its text let them grow."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class CallPiece:
    """A part of a call. The first one has the name, and only that one."""

    index: int
    name: str | None
    arguments: str


@dataclass(slots=True, frozen=True)
class Thought:
    """A piece of a turn's reasoning."""

    text: str


Part = str | CallPiece | Thought  # a string is content


@dataclass(slots=True)
class TurnDelta:
    """The parts by which a piece of text lets a turn grow, in their order."""

    parts: list[Part] = field(default_factory=list)
    ends_call: bool = False  # the first call is over

    def __bool__(self) -> bool:
        return bool(self.parts)

    @property
    def content(self) -> str:
        return "".join([part for part in self.parts if isinstance(part, str)])

    @property
    def reasoning(self) -> str:
        return "".join([part.text for part in self.parts if isinstance(part, Thought)])

    @property
    def calls(self) -> list[CallPiece]:
        return [part for part in self.parts if isinstance(part, CallPiece)]

    def say(self, text: str) -> None:
        """Add content."""
        if text and self.parts and isinstance(self.parts[-1], str):
            self.parts[-1] += text
        elif text:
            self.parts.append(text)

    def forget_thoughts(self) -> None:
        self.parts = [part for part in self.parts if not isinstance(part, Thought)]
