"""Drafts from a sequence's own tokens: what followed when it said the same before.

After "The quick brown" ... "The quick", the draft is "brown" and what came after it. Extraction, edits of code and
quotations repeat their prompt, so that such drafts are often right, and they cost no model (prompt lookup decoding,
Saxena 2023; vLLM's method "ngram").
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import Protocol

_MAX_CANDIDATES = 8  # earlier places that are compared: more find a longer match in text that repeats short ones


class Proposer(Protocol):
    """Drafts of what a sequence says next. A wrong draft costs time and changes nothing."""

    def propose(self, tokens: Tokens[int], num_tokens: int) -> tuple[int, ...]:
        """Return up to `num_tokens` tokens that may follow; none where nothing is to be expected."""
        ...


class NgramProposer:
    """One sequence's index of its n-grams, which grows with it. Implements `Proposer`."""

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        """A match has at least `min_ngram` tokens; of several the one with most counts, up to `max_ngram`."""
        self._min, self._max = min_ngram, max_ngram
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram of min_ngram tokens -> the position after it
        self._earlier: list[int] = []  # position after an n-gram -> the one after the same n-gram before it; 0: none

    def propose(self, tokens: Tokens[int], num_tokens: int) -> tuple[int, ...]:
        self._index(tokens)
        place = self._best_place(tokens)
        if place == 0 or num_tokens <= 0:
            return ()
        # A match that overlaps the end repeats itself: the draft goes on with what it has drafted.
        period = len(tokens) - place
        return tuple([tokens[place + index % period] for index in range(num_tokens)])

    def _index(self, tokens: Tokens[int]) -> None:
        """Take in the tokens that are new."""
        size, latest, earlier = self._min, self._latest, self._earlier
        for end in range(len(earlier), len(tokens) + 1):
            if end < size:
                earlier.append(0)
                continue
            ngram = tuple(tokens[end - size : end])
            earlier.append(latest.get(ngram, 0))
            latest[ngram] = end

    def _best_place(self, tokens: Tokens[int]) -> int:
        """Return the position after the longest match of the sequence's end, the latest one of equals; 0: none."""
        end = len(tokens)
        best, best_length, place = 0, 0, self._earlier[end]
        for _ in range(_MAX_CANDIDATES):
            if place == 0:
                break
            length = self._min
            while length < min(self._max, place) and tokens[place - length - 1] == tokens[end - length - 1]:
                length += 1
            if length > best_length:
                best, best_length = place, length
            place = self._earlier[place]
        return best
