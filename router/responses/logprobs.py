"""The log probabilities of an answer's text: those of the tokens that it is made of, and none of thoughts and calls.

A piece is read token by token, so that it is seen what each becomes. What may still become a part of a call waits.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ...common.request import SampledToken
from ..api.chat_turns import ChatTurns
from ..api.choice import TextPiece
from ..api.form import FormContext
from ..api.logprobs import chat_logprobs
from ..turns.parts import TurnDelta

Logprobs = list[object]  # of a token each, as OpenAI's JSON has them


class TokenReader:
    """Reads the pieces of an answer of one choice."""

    def __init__(self, context: FormContext, turns: ChatTurns) -> None:
        self._context, self._turns = context, turns
        self._num_top = context.options.num_logprobs  # None: nobody asks
        self._length = 0  # of the text so far
        self._waiting: list[tuple[SampledToken, str]] = []  # tokens, and their text, that may be the answer's

    def read(self, piece: TextPiece) -> Iterator[tuple[TurnDelta, Logprobs]]:
        """Yield what the piece adds to the turn, each part with the log probabilities of its text."""
        if self._num_top is None:
            yield self._turns.read(0, piece), []
            return
        for token, text in self._cut(piece):
            if token is not None:
                self._waiting.append((token, text))
            turn = self._turns.read(0, TextPiece(text))
            yield turn, self._told(turn)
        if piece.finish is not None:
            while self._waiting and not self._waiting[-1][1]:
                self._waiting.pop()  # the end of the sequence, which is no text
            turn = self._turns.read(0, TextPiece("", piece.finish))
            yield turn, self._told(turn)

    def _cut(self, piece: TextPiece) -> Iterator[tuple[SampledToken | None, str]]:
        """Yield the piece's text, in parts that begin where its tokens do."""
        start, self._length = self._length, self._length + len(piece.text)
        if not piece.tokens:
            yield None, piece.text
            return
        starts = [0, *(max(0, offset - start) for offset in piece.offsets[1:]), len(piece.text)]
        for token, begin, end in zip(piece.tokens, starts, starts[1:], strict=False):
            yield token, piece.text[begin:end]

    def _told(self, turn: TurnDelta) -> Logprobs:
        """Return what belongs to the part, of all that waits."""
        if turn.content:
            tokens = [token for token, _ in self._waiting]
            self._waiting.clear()
            context = self._context
            found = chat_logprobs(tokens, context.tokenizer, context.token_name, self._num_top or 0)
            return [msgspec.to_builtins(each) for each in found.content]
        if self._turns.is_beside_text(0):
            self._waiting.clear()
        return []
