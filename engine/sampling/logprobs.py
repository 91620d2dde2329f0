"""Log-probabilities in torch: those of tokens that are drawn, and of a prompt's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from msgspec.structs import replace
from torch import Tensor

from ...common.request import SampledToken


class Logprobs:
    """Log-softmax of raw logits, with each row's best tokens found once for the whole step."""

    def __init__(self, logits: Tensor, counts: Sequence[int | None]) -> None:
        """`counts[i]`: how many best tokens row i reports; None: no log-probabilities at all."""
        self._counts = counts
        self._slot = {row: slot for slot, row in enumerate(i for i, count in enumerate(counts) if count is not None)}
        wanted = list(self._slot)
        raw = logits if len(wanted) == len(counts) else logits[wanted]
        self._values = torch.log_softmax(raw, -1)
        most = min(max(counts[row] or 0 for row in wanted), logits.shape[1])
        best = self._values.topk(most)
        self._best_values: list[list[float]] = best.values.tolist()
        self._best_ids: list[list[int]] = best.indices.tolist()

    def tokens(self, row: int, token_ids: Sequence[int]) -> tuple[SampledToken, ...]:
        count = self._counts[row]
        if count is None:
            return tuple([SampledToken(token_id) for token_id in token_ids])
        slot = self._slot[row]
        top = tuple(zip(self._best_ids[slot][:count], self._best_values[slot][:count], strict=True))
        return tuple([SampledToken(i, float(self._values[slot, i]), top) for i in token_ids])

    def ranks(self, token_ids: Sequence[int]) -> list[int]:
        """Return the rank of a token of each row, if all report: how many are as likely, itself among them (vLLM)."""
        own = self._values.gather(1, torch.tensor(token_ids, device=self._values.device).unsqueeze(1))
        ranks: list[int] = (self._values >= own).sum(-1).tolist()
        return ranks


def prompt_logprobs(logits: Tensor, wanted: Sequence[tuple[int, int]]) -> list[SampledToken]:
    """Judge by row i of `logits` [n, vocab] the prompt token `wanted[i][0]`, and report the `wanted[i][1]` best."""
    logprobs = Logprobs(logits, [count for _, count in wanted])
    ranks = logprobs.ranks([token_id for token_id, _ in wanted])
    return [
        replace(logprobs.tokens(row, (token_id,))[0], rank=rank)
        for row, ((token_id, _), rank) in enumerate(zip(wanted, ranks, strict=True))
    ]


def prompt_logprobs_each(logits: Tensor, wanted: Sequence[tuple[int, int]]) -> list[SampledToken]:
    """Do as `prompt_logprobs` does, each row for itself and in memory of its own: the same bits in any company."""
    rows = torch.split(logits, 1)
    return [prompt_logprobs(row.clone(), [target])[0] for row, target in zip(rows, wanted, strict=True)]
