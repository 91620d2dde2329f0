"""Step-time models: non-negative least squares on what engine steps did and how long they took, forgetting slowly.

    step_s = base + tokens x token_s + pairs x pair_s + rows x row_s + context x context_s

One fit for steps that compute parts of prompts, one for mere decode steps: the first are bound by arithmetic, the
second by memory, and a chunk that shares a step with rows costs less than both alone. Relative errors are minimized,
so that steps of a millisecond count as much as those of a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...wire.workers import StepSample

_NUM_TERMS = 5
_MEMORY = 2000.0  # samples after which an old one counts 1 / e
_RIDGE = 1e-4
_SOLVE_EVERY = 16  # samples
_OUTLIER = 3.0  # times longer or shorter than predicted
_MIN_SAMPLES = 6  # before outliers can be told
_PERSISTENT = 12  # outliers in a row are no outliers: the machine has changed
_SHRUNK = 0.1  # weight of what was learned before that

_Vector = npt.NDArray[np.float64]


@dataclass(slots=True, frozen=True)
class StepCosts:
    """Seconds for each unit of what a step does."""

    base_s: float = 0.0
    token_s: float = 0.0
    pair_s: float = 0.0
    row_s: float = 0.0
    context_s: float = 0.0

    def step_s(self, *, tokens: float = 0, pairs: float = 0, rows: float = 0, context: float = 0) -> float:
        return self.base_s + tokens * self.token_s + pairs * self.pair_s + rows * self.row_s + context * self.context_s


class StepFit:
    """One kind of step of one kind of worker."""

    def __init__(self) -> None:
        self.num_samples = 0
        self.num_outliers = 0
        self._costs = StepCosts()
        self._moments: _Vector = np.zeros((_NUM_TERMS, _NUM_TERMS))
        self._targets: _Vector = np.zeros(_NUM_TERMS)
        self._scale: _Vector = np.ones(_NUM_TERMS)  # the largest of each term that was seen
        self._unsolved = 0
        self._outliers_in_a_row = 0

    @property
    def is_known(self) -> bool:
        return self.num_samples > 0

    @property
    def costs(self) -> StepCosts:
        if self._unsolved and (self._unsolved >= _SOLVE_EVERY or self.num_samples <= 2 * _SOLVE_EVERY):
            self._solve()
        return self._costs

    def observe(self, sample: StepSample) -> bool:
        """Learn from a step. False: it was an outlier."""
        if sample.step_s <= 0:
            return False
        if self._is_outlier(sample):
            return False
        terms = np.array((1.0, sample.prefill_tokens, sample.prefill_pairs, sample.decode_rows, sample.decode_context))
        self._rescale(terms)
        # By what the model says, not by what was measured: that would weigh every step that was lucky more.
        size_s = step_s(self.costs, sample) if self.num_samples >= _MIN_SAMPLES else sample.step_s
        size_s = max(size_s, sample.step_s / _OUTLIER)
        weighted = terms / self._scale / size_s
        keep = 1.0 - 1.0 / _MEMORY
        self._moments = keep * self._moments + np.outer(weighted, weighted)
        self._targets = keep * self._targets + weighted * (sample.step_s / size_s)
        self.num_samples += 1
        self._unsolved += 1
        return True

    def _is_outlier(self, sample: StepSample) -> bool:
        if self.num_samples < _MIN_SAMPLES:
            return False
        ratio = sample.step_s / max(1e-9, step_s(self.costs, sample))
        if 1 / _OUTLIER <= ratio <= _OUTLIER:
            self._outliers_in_a_row = 0
            return False
        self.num_outliers += 1
        self._outliers_in_a_row += 1
        if self._outliers_in_a_row < _PERSISTENT:
            return True
        self._outliers_in_a_row = 0
        self._moments *= _SHRUNK
        self._targets *= _SHRUNK
        return False

    def _rescale(self, terms: _Vector) -> None:
        """Terms of very different size would make the equations ill-conditioned."""
        scale = np.maximum(self._scale, terms)
        if np.any(scale > self._scale):
            change = self._scale / scale
            self._moments *= np.outer(change, change)
            self._targets *= change
            self._scale = scale

    def _solve(self) -> None:
        """Non-negative coefficients: terms whose best one is negative are left out, the worst first."""
        self._unsolved = 0
        trace = float(np.trace(self._moments))
        ridge = _RIDGE * trace / _NUM_TERMS
        active = [term for term in range(_NUM_TERMS) if self._moments[term, term] > 0]
        found: _Vector = np.zeros(_NUM_TERMS)
        while active:
            matrix = self._moments[np.ix_(active, active)] + ridge * np.eye(len(active))
            values = np.linalg.solve(matrix, self._targets[active])
            worst = int(np.argmin(values))
            if values[worst] >= 0:
                found[active] = values
                break
            del active[worst]
        base_s, token_s, pair_s, row_s, context_s = (float(value) for value in found / self._scale)
        self._costs = StepCosts(base_s, token_s, pair_s, row_s, context_s)


def step_s(costs: StepCosts, sample: StepSample) -> float:
    """Return how long a step like this takes by the model."""
    return costs.step_s(
        tokens=sample.prefill_tokens,
        pairs=sample.prefill_pairs,
        rows=sample.decode_rows,
        context=sample.decode_context,
    )
