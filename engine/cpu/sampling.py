"""Sampling in C++: `sampling.sample`'s tokens and log-probabilities, each row by one thread and by itself.

In torch a row with a temperature takes 3 to 7 % of a decode step, and eight of them up to a sixth. Greedy rows are
numpy's as there. Results are the same to the bit in any company, on any number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor

from ...common.request import SampledToken
from ..sampling.sampling import (
    SampleRow,
    best_tokens,
    edit_logits,
    forget_others,
    mask_logits,
    plain_tokens,
)
from ..sampling.seen import SeenTokens
from .decoder import NativeDecoder
from .described import Draw, Report


class NativeSampler:
    """Used by the decoder's thread."""

    def __init__(self, decoder: NativeDecoder, eos_token_ids: frozenset[int]) -> None:
        self._decoder = decoder
        self._eos_token_ids = eos_token_ids
        self._seen = SeenTokens()

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[tuple[SampledToken, ...]]:
        """Return the tokens of each row's choices, none where its logits are no distribution.

        `logits` [rows, vocab] float32 is overwritten where rows edit it.
        """
        forget_others(self._seen, rows)
        if all(row.is_plain for row in rows):
            return list(map(plain_tokens, best_tokens(logits), rows))
        logprobs = self._logprobs(logits, rows)
        for index, row in enumerate(rows):
            if row.edits_numbers:
                edit_logits(logits[index], row, self._eos_token_ids, self._seen)
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
        uniforms = np.array([number for index in drawn for number in rows[index].uniforms])
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
        told, (totals, best, _) = logits.numpy(), self._report(logits, wanted)
        return {
            index: _Logprobs(told[index].copy() if _changes(rows[index]) else told[index], total, own)
            for index, total, own in zip(wanted, totals, best, strict=True)
        }

    def prompt_logprobs(self, logits: Tensor, targets: Sequence[tuple[int, int]]) -> list[SampledToken]:
        """Judge by row i of `logits` the prompt token `targets[i][0]`, and report the `targets[i][1]` best."""
        tokens = [token_id for token_id, _ in targets]
        assert min(tokens) >= 0 and max(tokens) < logits.shape[1], "a prompt's token is not in the vocabulary"
        counts = {index: count for index, (_, count) in enumerate(targets)}
        totals, best, ranks = self._report(logits, counts, tokens)
        of_rows = map(_Logprobs, logits.numpy(), totals, best)
        return [
            replace(of_row.tokens([token_id])[0], rank=rank)
            for of_row, token_id, rank in zip(of_rows, tokens, ranks, strict=True)
        ]

    def _report(
        self, logits: Tensor, counts: Mapping[int, int], tokens: Sequence[int] = ()
    ) -> tuple[list[float], list[list[int]], list[int]]:
        """Return logarithms of sums and the best tokens of the rows in `counts`, and the ranks of their `tokens`."""
        size, num_rows = logits.shape[1], len(counts)
        totals, best = np.empty(num_rows), np.empty((num_rows, min(size, max(counts.values()))), np.int32)
        ranks, reports = np.empty(num_rows, np.int32), (Report * num_rows)()
        for slot, (report, (index, count)) in enumerate(zip(reports, counts.items(), strict=True)):
            report.logits, report.count = _row_at(logits, index), min(size, count)
            report.best, report.total = best[slot].ctypes.data, totals[slot:].ctypes.data
            if tokens:
                report.rank, report.token = ranks[slot:].ctypes.data, tokens[slot]
        self._decoder.report(reports, size)
        kept = [own[: report.count].tolist() for own, report in zip(best, reports, strict=True)]
        return totals.tolist(), kept, ranks.tolist() if tokens else []


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


def _row_at(logits: Tensor, index: int) -> int:
    return logits.data_ptr() + index * logits.stride(0) * logits.itemsize
