"""A draft model's part of a simulated step: a forward for each drafted token, and what it computes to keep up.

Its steps are taken to be a share of what the served model's would be for the same work. Which positions it computes is
told by the batch, as the engine that serves is told (`engine/draft.py`). No drafted token is unknown here before the
step: what a draft says is the run's own (`jobs.SimDrafts`).
"""

from __future__ import annotations

from ...common.batch import Batch, BatchRow
from ...sizing.steps import StepModel, StepWork


def draft_s(batch: Batch, steps: StepModel, share: float) -> float:
    """Return the seconds of a step that the draft model takes. `share`: of what the served model's `steps` take."""
    if not share or not batch.rows:
        return 0.0
    works = [work for work in (*_proposals(batch), _rest(batch)) if work.prefill_tokens or work.decode_rows]
    return share * sum(steps.step_s(work) for work in works)


def _proposals(batch: Batch) -> list[StepWork]:
    """Return the work of each drafted token, of all rows that draft so many."""
    drafting = [row for row in batch.rows if row.draft]
    works = []
    for depth in range(max((len(row.draft) for row in drafting), default=0)):
        rows = [row for row in drafting if len(row.draft) > depth]
        behind = 0 if depth else sum(row.start - _span(row)[0] for row in rows)  # what it lacks goes along
        works.append(StepWork(behind, 0, len(rows), sum(row.start + depth for row in rows)))
    return works


def _rest(batch: Batch) -> StepWork:
    """Return what is fed behind the served model: prompts above all."""
    tokens = pairs = 0
    for row in batch.rows:
        first, end = _span(row)
        first = row.end - 1 if row.draft else first
        if count := max(0, end - first):
            tokens += count
            pairs += count * (2 * first + count) // 2
    return StepWork(tokens, pairs)


def _span(row: BatchRow) -> tuple[int, int]:
    return row.draft_span if row.draft_span is not None else (row.start, row.end)
