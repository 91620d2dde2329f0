"""The answer of one choice so far: each token once and in order, whatever order messages come in.

Tokens have an index in their choice. Index n is accepted after n-1 and once; what comes early is kept (bounded),
what comes again is dropped. The accepted tokens are what a resumed attempt starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...common.request import FinishReason, SampledToken
from ...wire.results import ChoiceTokens

MAX_EARLY_TOKENS = 64  # kept for each choice while an earlier one is missing


@dataclass(slots=True)
class Drops:
    """Tokens of one message that were not accepted, by cause."""

    duplicate: int = 0  # had it already
    mismatch: int = 0  # had another token at that index
    overflow: int = 0  # too far ahead, or past the end


NO_DROPS = Drops()  # of nearly every message; not to be changed


@dataclass(slots=True)
class ChoiceState:
    """The answer of one choice so far. `tokens` only grows, and not after `finish` is set."""

    max_tokens: int
    tokens: list[SampledToken] = field(default_factory=list)
    finish: str | None = None
    early: dict[int, SampledToken] = field(default_factory=dict)
    end: tuple[int, str] | None = None  # (count, reason): finish once so many are accepted

    def accept(self, update: ChoiceTokens) -> Drops:
        """Take what continues `tokens`, keep what comes early, drop the rest."""
        if self._is_next(update):
            self.tokens.extend(update.tokens)
            self.finish = update.finish
            return NO_DROPS
        drops = Drops()
        for index, token in enumerate(update.tokens, update.first_index):
            self._accept_one(index, token, drops)
        if update.finish is not None and self.finish is None:
            self.end = (update.first_index + len(update.tokens), update.finish)
        self._close_gap()
        return drops

    def _is_next(self, update: ChoiceTokens) -> bool:
        """Nothing is missing before it, nothing waits for it, and there is room for all of it."""
        start = len(self.tokens)
        is_in_turn = update.first_index == start and start + len(update.tokens) <= self.max_tokens
        return is_in_turn and self.finish is None and self.end is None and not self.early

    def _accept_one(self, index: int, token: SampledToken, drops: Drops) -> None:
        known = self.tokens[index] if index < len(self.tokens) else self.early.get(index)
        if known is not None:
            drops.duplicate += known.token_id == token.token_id
            drops.mismatch += known.token_id != token.token_id
        elif self.finish is not None or index >= self.max_tokens:
            drops.overflow += 1
        elif index == len(self.tokens):
            self.tokens.append(token)
            self._close_gap()
        elif len(self.early) < MAX_EARLY_TOKENS:
            self.early[index] = token
        else:
            drops.overflow += 1

    def _close_gap(self) -> None:
        while self.finish is None:
            if self.end is not None and len(self.tokens) >= self.end[0]:
                self.finish = self.end[1]
                self.early.clear()
            elif (token := self.early.pop(len(self.tokens), None)) is not None:
                self.tokens.append(token)
            else:
                return

    @property
    def has_gap(self) -> bool:
        """Something came that cannot be accepted yet."""
        return self.finish is None and (bool(self.early) or self.end is not None)

    def end_now(self, reason: str) -> None:
        """The router itself ends the choice."""
        self.finish = reason
        self.forget_early()

    def restore(self, tokens: Sequence[SampledToken], finish: str | None) -> None:
        """Take what was accepted in an earlier life of the request."""
        self.tokens.extend(tokens)
        self.finish = self.finish or finish

    def forget_early(self) -> None:
        """A new attempt begins: only accepted tokens carry over."""
        self.early.clear()
        self.end = None


def is_natural(finish: str | None) -> bool:
    """An end that the client asked for, not one that a worker was forced to."""
    return finish in (FinishReason.STOP, FinishReason.LENGTH)
