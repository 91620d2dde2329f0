"""A draft model's part of a simulated step: a forward for each drafted token, and what it computes to keep up.

Its steps are taken to be a share of what the served model's would be for the same work. Which positions it computes is
told by the batch, as the engine that serves is told (`engine/draft.py`). No drafted token is unknown here before the
step: what a draft says is the run's own (`jobs.SimDrafts`).
"""

from __future__ import annotations

from ...common.batch import Batch
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
        behind = 0 if depth else sum(row.start - row.draft_model_span[0] for row in rows)  # what it lacks goes along
        works.append(StepWork(behind, 0, len(rows), sum(row.start + depth for row in rows)))
    return works


def _rest(batch: Batch) -> StepWork:
    """Return what is fed behind the served model: prompts above all."""
    tokens = pairs = 0
    for row in batch.rows:
        rest = row.draft_model_rest
        tokens += len(rest)
        pairs += len(rest) * (2 * rest.start + len(rest)) // 2
    return StepWork(tokens, pairs)
