"""Drafts from a sequence's own tokens: what followed when it said the same before.

After "The quick brown" ... "The quick", the draft is "brown" and what came after it. Extraction, edits of code and
quotations repeat their prompt, so that such drafts are often right, and they cost no model (prompt lookup decoding,
Saxena 2023; vLLM's method "ngram").
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from itertools import islice
from typing import Protocol

MAX_CANDIDATES = 8  # earlier places that are compared: more find a longer match in text that repeats short ones
MAX_INDEXED = 4096  # tokens in a step, of each sequence: two milliseconds


class Proposer(Protocol):
    """Drafts of what a sequence says next. A wrong draft costs time and changes nothing."""

    def propose(self, tokens: Tokens[int], num_tokens: int) -> tuple[int, ...]:
        """Return up to `num_tokens` tokens that may follow; none where nothing is to be expected."""
        ...


class NgramIndex:
    """One sequence's places after each of its n-grams, which grow with it."""

    def __init__(self, ngram: int) -> None:
        self._size = ngram
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram -> the position after it
        self._earlier: list[int] = []  # position after an n-gram -> the one after the same n-gram before it; 0: none

    def places(self, tokens: Tokens[int]) -> Iterator[int]:
        """Take in tokens that are new. Yield the positions after what they end with, the latest first.

        A long prompt takes several calls, which yield nothing: in one it would hold up a step of all sequences.
        """
        size, latest, earlier = self._size, self._latest, self._earlier
        for end in range(len(earlier), min(len(tokens) + 1, len(earlier) + MAX_INDEXED)):
            if end < size:
                earlier.append(0)
                continue
            ngram = tuple(tokens[end - size : end])
            earlier.append(latest.get(ngram, 0))
            latest[ngram] = end
        return self._before(len(tokens)) if len(earlier) > len(tokens) else iter(())

    def _before(self, place: int) -> Iterator[int]:
        while place := self._earlier[place]:
            yield place


class NgramProposer:
    """`NgramProposer` goes on from one sequence's own n-grams. Implements `Proposer`."""

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        """A match has at least `min_ngram` tokens; of several the one with most counts, up to `max_ngram`."""
        self._min, self._max = min_ngram, max_ngram
        self._index = NgramIndex(min_ngram)

    def propose(self, tokens: Tokens[int], num_tokens: int) -> tuple[int, ...]:
        place = self._best_place(tokens)
        return tuple(following(tokens, place, num_tokens)) if place and num_tokens > 0 else ()

    def _best_place(self, tokens: Tokens[int]) -> int:
        """Return the position after the longest match of the sequence's end, the latest one of equals; 0: none."""
        end, places = tokens[-self._max :], islice(self._index.places(tokens), MAX_CANDIDATES)
        return max(places, key=lambda place: num_equal(tokens[max(0, place - self._max) : place], end), default=0)


def num_equal(one: Tokens[int], other: Tokens[int]) -> int:
    """Return how many tokens both end with."""
    if one == other:
        return len(other)
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def following(tokens: Tokens[int], place: int, count: int) -> list[int]:
    """Return so many tokens from a place on. What would be beyond the end repeats what lies between: a match that
    overlaps the end repeats itself.
    """
    there = list(tokens[place : place + count])
    return (there * -(-count // len(there)))[:count]
