"""Edits of a step's logits as arrays: biases, banned tokens and penalties of all rows, uploaded at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..sampling.sampling import SampleRow


@dataclass(slots=True, frozen=True)
class Edits:
    """Each `_at` is [2, n]: rows and tokens, in which no pair comes twice."""

    bias_at: NDArray[np.int64]
    bias: NDArray[np.float32]
    banned_at: NDArray[np.int64]
    repeated_at: NDArray[np.int64]  # prompt and output
    repetition: NDArray[np.float32]
    counted_at: NDArray[np.int64]  # output alone
    counts: NDArray[np.float32]
    frequency: NDArray[np.float32]
    presence: NDArray[np.float32]

    @property
    def sizes(self) -> list[int]:
        return [part.shape[1] for part in (self.bias_at, self.banned_at, self.repeated_at, self.counted_at)]


class _Places:
    """(row, token) pairs with a number or two each, gathered row by row."""

    def __init__(self, num_values: int) -> None:
        self._at: list[NDArray[np.int64]] = [np.empty((2, 0), np.int64)]
        self._values: list[list[NDArray[np.float32]]] = [[np.empty(0, np.float32)] for _ in range(num_values)]

    def add(self, row: int, tokens: NDArray[np.int64], *values: float | NDArray[np.generic]) -> None:
        self._at.append(np.stack((np.full(len(tokens), row), tokens)))
        for known, value in zip(self._values, values, strict=True):
            known.append(np.broadcast_to(np.asarray(value, np.float32), tokens.shape))

    @property
    def at(self) -> NDArray[np.int64]:
        return np.concatenate(self._at, 1)

    @property
    def values(self) -> list[NDArray[np.float32]]:
        return [np.concatenate(parts) for parts in self._values]


def collect_edits(rows: Sequence[SampleRow], vocab_size: int, eos_token_ids: frozenset[int]) -> Edits | None:
    """Gather what the rows ask for; None: nothing."""
    if not any(row.edits_logits for row in rows):
        return None
    bias, banned, repeated, counted = _Places(1), _Places(0), _Places(1), _Places(3)
    for index, row in enumerate(rows):
        params = row.params
        if params.logit_bias:
            ids = [i for i in params.logit_bias if 0 <= i < vocab_size]
            bias.add(index, np.array(ids, np.int64), np.array([params.logit_bias[i] for i in ids]))
        if row.mask is None and (barred := row.banned(eos_token_ids)):
            banned.add(index, np.array([i for i in barred if 0 <= i < vocab_size], np.int64))
        if params.repetition_penalty != 1:
            repeated.add(index, np.unique(np.array(row.seen_token_ids, np.int64)), params.repetition_penalty)
        if row.has_penalties and row.output_index:
            output = np.array(row.seen_token_ids[row.num_prompt_tokens :], np.int64)
            tokens, times = np.unique(output, return_counts=True)
            counted.add(index, tokens, times, params.frequency_penalty, params.presence_penalty)
    counts, frequency, presence = counted.values
    return Edits(
        bias_at=bias.at,
        bias=bias.values[0],
        banned_at=banned.at,
        repeated_at=repeated.at,
        repetition=repeated.values[0],
        counted_at=counted.at,
        counts=counts,
        frequency=frequency,
        presence=presence,
    )
