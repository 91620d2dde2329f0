"""Edits of a step's logits as arrays: biases, banned tokens and penalties of all rows, uploaded at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..sampling.sampling import SampleRow, forget_others
from ..sampling.seen import SeenTokens, Tokens

_NO_TOKENS: NDArray[np.int32] = np.empty(0, np.int32)
_NO_NUMBERS: NDArray[np.float32] = np.empty(0, np.float32)


@dataclass(slots=True)
class Places:
    """`Places` are rows and tokens, in which no pair comes twice, gathered row by row."""

    _parts: list[NDArray[np.int64]] = field(default_factory=lambda: [np.empty((2, 0), np.int64)])

    def add(self, row: int, token_ids: Sequence[int]) -> None:
        self._parts.append(np.stack((np.full(len(token_ids), row), np.array(token_ids, np.int64))))

    @property
    def at(self) -> NDArray[np.int64]:
        """Return [2, n]: rows and tokens."""
        return np.concatenate(self._parts, 1)


@dataclass(slots=True)
class SeenPlaces:
    """`SeenPlaces` are the seen tokens of some rows, which the device tells apart by where each row's end.

    A row has as many as its context has different ones, so they are copied as they are kept.
    """

    rows: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # of each of these rows, behind its last token
    _tokens: list[NDArray[np.int32]] = field(default_factory=lambda: [_NO_TOKENS])
    _counts: list[NDArray[np.float32]] = field(default_factory=lambda: [_NO_NUMBERS])

    def add(self, row: int, seen: Tokens) -> None:
        tokens, counts = seen
        self.rows.append(row)
        self.ends.append(self.num_tokens + len(tokens))
        self._tokens.append(tokens)
        self._counts.append(counts)

    @property
    def num_tokens(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def arrays(self) -> list[NDArray[np.int32]]:
        """Return rows, ends and tokens."""
        return [np.array(self.rows, np.int32), np.array(self.ends, np.int32), np.concatenate(self._tokens)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """Return how often each token came."""
        return np.concatenate(self._counts)


@dataclass(slots=True)
class Edits:
    """Numbers of a penalty are one for each of its rows."""

    biased: Places = field(default_factory=Places)
    bias: list[float] = field(default_factory=list)
    banned: Places = field(default_factory=Places)
    repeated: SeenPlaces = field(default_factory=SeenPlaces)  # prompt and output
    repetition: list[float] = field(default_factory=list)
    counted: SeenPlaces = field(default_factory=SeenPlaces)  # output alone
    frequency: list[float] = field(default_factory=list)
    presence: list[float] = field(default_factory=list)


def collect_edits(
    rows: Sequence[SampleRow], vocab_size: int, eos_token_ids: frozenset[int], seen: SeenTokens
) -> Edits | None:
    """Gather what the rows ask for; None: nothing."""
    forget_others(seen, rows)
    if not any(row.edits_logits for row in rows):
        return None
    edits = Edits()
    for index, row in enumerate(rows):
        params, biases = row.params, row.biases(vocab_size)
        if biases:
            edits.biased.add(index, [*biases])
            edits.bias += biases.values()
        if row.mask is None and (barred := row.banned(vocab_size, eos_token_ids)):
            edits.banned.add(index, barred)
        if params.repetition_penalty != 1:
            edits.repeated.add(index, row.seen_tokens(seen))
            edits.repetition.append(params.repetition_penalty)
        if row.counts_output and row.output_index:
            edits.counted.add(index, row.output_tokens(seen))
            edits.frequency.append(params.frequency_penalty)
            edits.presence.append(params.presence_penalty)
    return edits
