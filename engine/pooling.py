"""Hidden states become sums: what a step computes of embeddings.

An embedding is the sum of some tokens' hidden states behind the final norm, scaled to length 1 (`common/vectors.py`).
A chunk yields the sum over its own of these tokens, so that nothing of a prompt is kept here between its steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.batch import Batch, RowOutput


def with_pooled(batch: Batch, rows: Sequence[RowOutput], states: Tensor) -> list[RowOutput]:
    """Return the rows with their sums. `states` [tokens, hidden_size]: of the pooled tokens of all rows, in order."""
    parts = torch.split(states, [len(row.pooled_tokens) for row in batch.rows])
    sums = torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).float().cpu()
    finite = sums.isfinite().all(1).tolist()
    return [
        _with_sum(row, total, is_finite) if len(part) else row
        for row, part, total, is_finite in zip(rows, parts, sums, finite, strict=True)
    ]


def _with_sum(row: RowOutput, total: Tensor, is_finite: bool) -> RowOutput:
    if not is_finite:
        return RowOutput((), is_finite=False)
    return row._replace(pooled=total.numpy().astype("<f4").tobytes())
