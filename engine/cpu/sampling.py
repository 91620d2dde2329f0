"""Sampling in C++: `sampling.sample`'s tokens and log-probabilities, each row by one thread and by itself.

In torch a row with a temperature takes 3 to 7 % of a decode step, and eight of them up to a sixth. Greedy rows are
numpy's as there. Results are the same to the bit in any company, on any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...common.request import SampledToken
from ..sampling.sampling import SampleRow, best_tokens, edit_logits, mask_logits, plain_tokens, uniform
from .decoder import NativeDecoder
from .described import Draw, Report


class NativeSampler:
    """Used by the decoder's thread."""

    def __init__(self, decoder: NativeDecoder, eos_token_ids: frozenset[int]) -> None:
        self._decoder = decoder
        self._eos_token_ids = eos_token_ids

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[tuple[SampledToken, ...]]:
        """Return the tokens of each row's choices, none where its logits are no distribution.

        `logits` [rows, vocab] float32 is overwritten where rows edit it.
        """
        if all(row.is_plain for row in rows):
            return list(map(plain_tokens, best_tokens(logits), rows))
        logprobs = self._logprobs(logits, rows)
        for index, row in enumerate(rows):
            if row.edits_numbers:
                edit_logits(logits[index], row, self._eos_token_ids)
        greedy = [index for index, row in enumerate(rows) if row.params.is_greedy]
        chosen = dict(zip(greedy, self._best(logits, rows, greedy), strict=True))
        drawn = [index for index, row in enumerate(rows) if not row.params.is_greedy]
        chosen |= zip(drawn, self._drawn(logits, rows, drawn), strict=True)
        of_rows = (logprobs.get(index, _NOTHING).tokens(chosen[index]) for index in range(len(rows)))
        return [() if any(token.is_nan for token in tokens) else tokens for tokens in of_rows]

    def _best(self, logits: Tensor, rows: Sequence[SampleRow], greedy: list[int]) -> list[list[int]]:
        for index in greedy:
            mask_logits(logits[index], rows[index], self._eos_token_ids)
        if not greedy:
            return []
        best = best_tokens(logits if len(greedy) == len(rows) else logits[greedy])
        return [tokens * len(rows[index].choices) for index, tokens in zip(greedy, best, strict=True)]

    def _drawn(self, logits: Tensor, rows: Sequence[SampleRow], drawn: list[int]) -> list[list[int]]:
        if not drawn:
            return []
        size, counts = logits.shape[1], [len(rows[index].choices) for index in drawn]
        uniforms = np.array([number for index in drawn for number in _uniforms(rows[index])])
        tokens, masks = np.empty(len(uniforms), np.int32), [self._mask(rows[index], size) for index in drawn]
        draws, at = (Draw * len(drawn))(), 0
        for draw, index, count, mask in zip(draws, drawn, counts, masks, strict=True):
            params = rows[index].params
            draw.logits, draw.count = _row_at(logits, index), count
            draw.allowed = None if mask is None else mask.ctypes.data
            draw.uniforms, draw.tokens = uniforms[at:].ctypes.data, tokens[at:].ctypes.data
            draw.temperature, draw.top_k = params.temperature, max(params.top_k, 0)
            draw.top_p, draw.min_p = params.top_p, params.min_p
            at += count
        self._decoder.draw(draws, size)
        found = iter(tokens.tolist())
        of_rows = [[next(found) for _ in range(count)] for count in counts]
        return [ids if ids[0] >= 0 else [] for ids in of_rows]

    def _mask(self, row: SampleRow, vocab_size: int) -> NDArray[np.uint32] | None:
        if row.mask is None:
            return None
        return np.ascontiguousarray(row.allowed_words(vocab_size, self._eos_token_ids), np.uint32)

    def _logprobs(self, logits: Tensor, rows: Sequence[SampleRow]) -> dict[int, _Logprobs]:
        """Tell of the rows that ask for it, by what the model gave them."""
        wanted = {index: row.params.logprobs for index, row in enumerate(rows) if row.params.logprobs is not None}
        if not wanted:
            return {}
        size, told = logits.shape[1], logits.numpy()
        totals, best = np.empty(len(wanted)), np.empty((len(wanted), min(size, max(wanted.values()))), np.int32)
        reports = (Report * len(wanted))()
        for slot, (report, (index, count)) in enumerate(zip(reports, wanted.items(), strict=True)):
            report.logits, report.count = _row_at(logits, index), min(size, count)
            report.best, report.total = best[slot].ctypes.data, totals[slot:].ctypes.data
        self._decoder.report(reports, size)
        return {
            index: _Logprobs(
                told[index].copy() if _changes(rows[index]) else told[index],
                float(totals[slot]),
                best[slot, : reports[slot].count].tolist(),
            )
            for slot, index in enumerate(wanted)
        }


class _Logprobs(NamedTuple):
    """One row's, as the model gave it."""

    logits: NDArray[np.float32] | None  # None: nothing is told
    total: float  # the logarithm of the sum of all e^logit
    best: list[int]

    def tokens(self, token_ids: Sequence[int]) -> tuple[SampledToken, ...]:
        if self.logits is None:
            return tuple([SampledToken(token_id) for token_id in token_ids])
        top = tuple((token_id, self._logprob(token_id)) for token_id in self.best)
        return tuple([SampledToken(token_id, self._logprob(token_id), top) for token_id in token_ids])

    def _logprob(self, token_id: int) -> float:
        assert self.logits is not None
        return float(np.float32(float(self.logits[token_id]) - self.total))


_NOTHING = _Logprobs(None, 0.0, [])


def _changes(row: SampleRow) -> bool:
    """Tell whether its logits are others in the end: a mask is heeded beside them where something is drawn."""
    return row.edits_numbers or (row.params.is_greedy and row.mask is not None)


def _uniforms(row: SampleRow) -> list[float]:
    return [uniform(row.params.seed, choice, row.output_index) for choice in row.choices]


def _row_at(logits: Tensor, index: int) -> int:
    return logits.data_ptr() + index * logits.stride(0) * logits.itemsize
