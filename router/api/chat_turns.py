"""The choices of a chat as turns: each piece of text becomes reasoning, content and parts of calls."""

from __future__ import annotations

from dataclasses import dataclass

from ...common.request import FinishReason
from ..turns.definitions import ToolUse
from ..turns.dialect import Dialect
from ..turns.parts import TurnDelta
from ..turns.reasoning import ReasoningCounter
from ..turns.turn import TurnReader, WholeCharacters, call_id
from .answer import Answer
from .choice import TextPiece

TOOL_CALLS = "tool_calls"


@dataclass(slots=True, frozen=True)
class TurnOptions:
    """The parts that a chat's answer may have beside text."""

    dialect: Dialect
    use: ToolUse
    begins_inside: bool  # of reasoning
    shows_reasoning: bool = True

    def reader(self) -> TurnReader:
        """Make the reader of one choice."""
        return self.dialect.reader(self.use, begins_inside=self.begins_inside)

    @property
    def shown_tokens(self) -> frozenset[str]:
        """The special tokens that are read in the answer's text."""
        return self.dialect.shown_marks(self.use)

    @property
    def has_marks(self) -> bool:
        """Tell whether the text has calls or thoughts, in which no stop string counts."""
        return bool(self.use.tools) or self.dialect.reasons

    def count(self) -> ReasoningCounter:
        """Make what counts one choice's tokens of reasoning, where the model reasons."""
        return self.dialect.count(begins_inside=self.begins_inside)


class ChatTurns:
    """The turns of one answer: `read` takes each choice's pieces in order."""

    def __init__(self, answer: Answer, options: TurnOptions) -> None:
        self._answer = answer
        self._options = options
        self._readers = [options.reader() for _ in answer.choices]
        self._characters = [WholeCharacters() for _ in answer.choices]
        self.is_plain = self._readers[0].is_plain

    def read(self, index: int, piece: TextPiece) -> TurnDelta:
        """Return what the piece adds to the choice's turn."""
        is_final = piece.finish is not None
        turn = self._readers[index].push(piece.text, is_final=is_final)
        if not self._options.shows_reasoning:
            turn.forget_thoughts()
        if not self.is_plain:
            turn.parts = self._characters[index].push(turn.parts, is_final=is_final)
        return turn

    def is_beside_text(self, index: int) -> bool:
        """Tell whether what came last of a choice is none of its content, nor may become some."""
        return self._readers[index].is_beside_text

    def finish(self, index: int, piece: TextPiece) -> str | None:
        """Return the reason as clients know it: a turn that ended by itself with calls ended for them."""
        if piece.finish == FinishReason.STOP and self._readers[index].has_called:
            return TOOL_CALLS
        return piece.finish

    def call_id(self, index: int, number: int) -> str:
        """Return the id of a choice's call, by its number in the turn."""
        request = self._answer.stream_of(index).request
        is_short = self._options.dialect.has_short_ids
        choice = index % self._answer.num_choices
        return call_id(request.sampling.seed, request.prompt_token_ids, choice, number, is_short=is_short)
