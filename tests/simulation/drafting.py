"""Drafts for simulated answers, right for a while and then anything, so that every length of acceptance comes up."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from .breach import Breach
from .oracle import VOCAB_SIZE, Answer


class Drafts:
    """One sequence's drafts. Implements `decode.ngrams.Proposer`."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def propose(self, tokens: Tokens[int], num_tokens: int) -> tuple[int, ...]:
        answer, end = self._answer, len(tokens)
        if end > len(answer.tags):
            raise Breach("I6", f"a sequence has {end} tokens, and its answer {len(answer.tags)}")
        chance = hash((answer.tags[end - 1], num_tokens))  # numbers alone: the same in every process
        right = answer.tokens[end : end + chance % (2 + max(0, num_tokens))]
        wrong = [hash((chance, place)) % VOCAB_SIZE for place in range(num_tokens)]
        return tuple((right + wrong)[: max(0, num_tokens)])
