"""One choice's tokens on their way to text: detokenized, cut at stop strings, counted.

Tokens go in as the dispatcher yields them, `TextPiece`s come out: text that can no longer change, with the tokens
behind it. What may be the beginning of a stop string, and half a character, stays here; so do the tokens of a piece
without text, until there is text or an end. Half a character at which an answer is cut for its length is in no text: a
client that sends the text back goes on behind the last whole one. `num_tokens` counts what the client gets, the token
that completed a stop string included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...common.request import FinishReason, SampledToken
from ...models.tokenizer import Detokenizer
from ..turns.reasoning import ReasoningCounter
from ..turns.turn import TurnReader
from .stops import StopMatcher


@dataclass(slots=True, frozen=True)
class TextOptions:
    """The client's options for the text of its choices."""

    stops: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # stop strings that begin before so many tokens do not count
    max_tokens: int = 16
    include_stop: bool = False
    skip_special_tokens: bool = True
    keep_tokens: bool = False  # logprobs or token ids were asked for
    shown_tokens: frozenset[str] = frozenset()  # special tokens that are text nevertheless
    reasoning: Callable[[], ReasoningCounter] | None = None  # makes what counts its tokens of reasoning
    # Makes the reader of a text that may call or think: in a call a stop string would cut arguments, in a thought it
    # would end the answer before it has begun.
    calls: Callable[[], TurnReader] | None = None
    has_one_call: bool = False  # the text ends with its first call


@dataclass(slots=True)
class TextPiece:
    """A piece of text: what one update adds to a choice."""

    text: str
    finish: str | None = None
    stop_reason: str | int | None = None  # the stop string or stop token that ended it
    tokens: Sequence[SampledToken] = ()  # only with keep_tokens
    offsets: Sequence[int] = ()  # where each of them begins in the choice's text

    @classmethod
    def joined(cls, pieces: Sequence[TextPiece]) -> TextPiece:
        """All of a choice's pieces as one."""
        return cls(
            "".join([piece.text for piece in pieces]),
            pieces[-1].finish,
            pieces[-1].stop_reason,
            [token for piece in pieces for token in piece.tokens],
            [offset for piece in pieces for offset in piece.offsets],
        )


class ChoiceText:
    """The state of one choice. After `finish` is set it takes nothing more."""

    __slots__ = (
        "_calls",
        "_detokenizer",
        "_length",
        "_offsets",
        "_options",
        "_reasoning",
        "_stop_reason",
        "_stops",
        "_tokens",
        "_unclear",
        "finish",
        "is_plain",
        "num_tokens",
    )

    def __init__(self, detokenizer: Detokenizer, options: TextOptions) -> None:
        self._detokenizer = detokenizer
        self._options = options
        self._stops = StopMatcher(options.stops, include_stop=options.include_stop) if options.stops else None
        self._reasoning = options.reasoning() if options.reasoning is not None else None
        self._calls = options.calls() if options.calls is not None else None
        self.is_plain = options.max_tokens != 0 and not (
            options.stops or options.keep_tokens or options.reasoning or options.calls
        )
        self._unclear = ""  # a call's beginning or none, in which stop strings would count
        self._tokens: list[SampledToken] = []  # not reported yet, as are their offsets
        self._offsets: list[int] = []
        self._length = 0  # characters made so far, held ones included
        self._stop_reason: str | int | None = None
        self.num_tokens = 0
        self.finish: str | None = None

    @property
    def num_reasoning_tokens(self) -> int | None:
        """None: they are not counted."""
        return None if self._reasoning is None else self._reasoning.num_tokens

    def push(self, tokens: Sequence[SampledToken], finish: str | None) -> TextPiece:
        """Take new tokens; `finish` as the worker says. The piece is empty where nothing can be shown yet."""
        if self.is_plain:
            text = self._push_plain(tokens, finish)
            return TextPiece(text) if finish is None else TextPiece(text, finish, self._stop_reason)
        if self._options.max_tokens == 0:  # echo alone: the token that was computed is not the client's
            self.finish = FinishReason.LENGTH
            return TextPiece("", self.finish)
        text = self._push_each(tokens, finish)
        if not self._tokens or not (text or self.finish):
            return TextPiece(text, self.finish, self._stop_reason)
        reported = TextPiece(text, self.finish, self._stop_reason, self._tokens, self._offsets)
        self._tokens, self._offsets = [], []
        return reported

    def _push_plain(self, tokens: Sequence[SampledToken], finish: str | None) -> str:
        """No token has to be looked at by itself."""
        self.num_tokens += len(tokens)
        if finish is None:
            return self._detokenizer.push([token.token_id for token in tokens])
        shown = tokens[:-1] if self._hides_last(tokens, finish) else tokens
        self.finish = finish
        return self._detokenizer.push([token.token_id for token in shown]) + self._rest(finish)

    def _push_each(self, tokens: Sequence[SampledToken], finish: str | None) -> str:
        shown = ""
        num_shown = len(tokens) - 1 if self._hides_last(tokens, finish) else len(tokens)
        for position, token in enumerate(tokens):
            self.num_tokens += 1
            if self._options.keep_tokens:
                self._tokens.append(token)
                self._offsets.append(self._length)
            if position < num_shown:
                text = self._detokenizer.push((token.token_id,))
                if self._reasoning is not None:
                    self._reasoning.push(text, self.num_tokens)
                shown += self._show(text)
            if self.finish is not None:
                return shown
        if finish is not None:
            shown += self._end(finish)
        return shown

    def _read_call(self, text: str, *, is_final: bool = False) -> str:
        """Return what of `text` may be seen now, of a text that may call or think: no stop string counts there."""
        assert self._calls is not None
        self._length += len(text)
        ends_call = self._calls.push(text).ends_call
        text = self._unclear + text
        self._unclear = ""
        if self._stops is not None and self._calls.is_beside_text:
            text = self._stops.release() + text
        elif self._stops is not None and self._calls.is_unclear and not is_final:
            self._unclear, text = text, ""
        else:
            text = self._cut(text)
        if ends_call and self._options.has_one_call:
            self.finish = self.finish or FinishReason.STOP
        return text

    def _hides_last(self, tokens: Sequence[SampledToken], finish: str | None) -> bool:
        """The token that made the worker stop (end of sequence, a stop token) is counted and reported, not shown."""
        if finish != FinishReason.STOP or not tokens:
            return False
        if tokens[-1].token_id in self._options.stop_token_ids:
            self._stop_reason = tokens[-1].token_id
        return not self._options.include_stop

    def _show(self, text: str, *, is_final: bool = False) -> str:
        """Return what of `text` may be seen now, and end the choice where a stop string is complete."""
        if self._calls is None:
            self._length += len(text)
            return self._cut(text)
        if self._stops is None:
            return self._read_call(text, is_final=is_final)
        shown = ""
        for char in text[:-1]:  # a call may begin within it, behind a stop string
            shown += self._read_call(char)
            if self.finish is not None:
                return shown
        return shown + self._read_call(text[-1:], is_final=is_final)

    def _cut(self, text: str) -> str:
        if self._stops is None or self.num_tokens < self._options.min_tokens:
            return text
        shown = self._stops.push(text)
        if self._stops.matched is not None:
            self.finish, self._stop_reason = FinishReason.STOP, self._stops.matched
        return shown

    def _rest(self, finish: str) -> str:
        """Return what half a character leaves behind: nothing where the answer was cut, as clients go on from there."""
        return "" if finish == FinishReason.LENGTH else self._detokenizer.flush()

    def _end(self, finish: str) -> str:
        shown = self._show(self._rest(finish), is_final=True)
        if self.finish is not None:  # the last half character completed a stop string
            return shown
        self.finish = finish
        return shown + self._stops.release() if self._stops is not None else shown
