"""A part of a grammar: which tokens an answer may begin with, as they come with a worker's task."""

from __future__ import annotations

from collections.abc import Sequence as TokenIds
from dataclasses import dataclass
from typing import Final

from ..common.grammar import GrammarBroken


@dataclass(frozen=True, slots=True)
class FirstMask:
    """Implements `CompiledGrammar` and `Matcher` as far as first tokens need them: what may come next is known."""

    words: bytes  # `Matcher.mask`
    is_ready: Final = True
    is_late: Final = False
    is_costly: Final = False
    failure: Final = ""

    def matcher(self) -> FirstMask:
        return self

    def mask(self) -> bytes:
        return self.words

    def forced(self) -> int | None:
        return None

    def accept(self, token_ids: TokenIds[int]) -> None:
        raise GrammarBroken("nothing is known of what follows a first token")

    def rollback(self, num_tokens: int) -> None:
        raise GrammarBroken("no token has been taken")
