"""Tokens that penalties look at: each one of a text once, with how often it came.

They are kept from step to step, so that a step costs what has come since, however long the text is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Tokens = tuple[NDArray[np.int32], NDArray[np.float32]]  # each once, in no order, and how often it came
_FEW = 16  # texts that stay though no row has them


class SeenTokens:
    """`SeenTokens` knows the texts whose rows were sampled last, which may only grow. Used by one thread.

    A text that begins again elsewhere is another list, and is read from its beginning.
    """

    def __init__(self) -> None:
        self._texts: dict[tuple[int, int], _Counted] = {}  # by id(text), and the first of its tokens that count

    def of(self, text: Sequence[int], first: int, draft: Sequence[int] = ()) -> Tokens:
        """Return the tokens from `first` on, and of a draft behind them. Nothing may be written to them."""
        counted = self._texts.get((id(text), first))
        if counted is None:
            counted = self._texts[id(text), first] = _Counted(text, first)
        counted.read_on()
        return counted.with_draft(draft)

    def keep(self, texts: Iterable[Sequence[int]]) -> None:
        """Forget all others, once they are many. Most steps know none, and look at no text."""
        if len(self._texts) <= _FEW:
            return
        kept = set(map(id, texts))
        if len(self._texts) > 2 * len(kept) + _FEW:
            self._texts = {key: counted for key, counted in self._texts.items() if key[0] in kept}


class _Counted:
    """Counts the tokens of a text from one on."""

    def __init__(self, text: Sequence[int], first: int) -> None:
        self._text = text  # while it is held, no other list has its id
        self._num_read = len(text)
        tokens, counts = np.unique(np.array(text[first:], np.int32), return_counts=True)
        self._tokens, self._counts = tokens, counts.astype(np.float32)  # with room behind those in use
        self._places = {token: place for place, token in enumerate(tokens.tolist())}

    def read_on(self) -> None:
        assert self._num_read <= len(self._text), "a text has lost tokens"
        for token in self._text[self._num_read :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._tokens):
                room = np.zeros(place // 2 + 16, np.int32)
                self._tokens = np.concatenate((self._tokens, room))
                self._counts = np.concatenate((self._counts, room.astype(np.float32)))
            self._tokens[place] = token
            self._counts[place] += 1
        self._num_read = len(self._text)

    def with_draft(self, draft: Sequence[int]) -> Tokens:
        size = len(self._places)
        tokens, counts = self._tokens[:size], self._counts[:size]
        if not draft:
            return tokens, counts
        new = {token: size + place for place, token in enumerate(set(draft) - self._places.keys())}
        tokens = np.concatenate((tokens, np.array([*new], np.int32)))
        counts = np.concatenate((counts, np.zeros(len(new), np.float32)))
        for token in draft:
            counts[new[token] if token in new else self._places[token]] += 1
        return tokens, counts
