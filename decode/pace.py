"""`Pace` says how many prompt tokens a step takes along without keeping running answers waiting, by finished steps.

    step = rows of one token (decode_s) + prompt tokens x token_s        room = what a step may take - decode_s

While prompts keep coming no step has rows alone. So what rows take is known by their number, from the calibration on,
and between the numbers that were seen: the average of the last such steps would be that of other rows.

`chunk_rows` shares them out among the prompts. Pure: times come in with the steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..common.batch import Batch, BatchRow, RowKind, StepOutput
from ..common.pacing import MIN_CHUNK_TOKENS, RunningAnswers, WaitingPrompts, longest_step_s
from ..common.request import Sequence

_INITIAL_TOKEN_S = 1e-3  # until chunks have been seen
_LEAST_TOKEN_S = 1e-7  # less than any takes; what is known at most doubles in a step, so it is soon left again
_SMOOTHING = 0.3
_WHOLE_CHUNK = 64  # tokens: what fewer take says more of the step than of them
_OUTLIER = 2.0  # times what is known: one slow step is no new speed


@dataclass(slots=True)
class RowTimes:
    """`RowTimes` learns what a step takes in which every row feeds one token, by the number of rows (seconds)."""

    _known: dict[int, float] = field(default_factory=dict)

    def learn(self, num_rows: int, step_s: float) -> None:
        expected_s = self.of(num_rows)
        value = min(step_s, _OUTLIER * expected_s) if expected_s else step_s
        known = self._known.get(num_rows, value)
        self._known[num_rows] = known + _SMOOTHING * (value - known)

    def of(self, num_rows: int) -> float:
        """Return what such a step takes; between and beyond the numbers that were seen on a line. 0: none was."""
        if not self._known or num_rows in self._known:
            return self._known.get(num_rows, 0.0)
        fewer = [rows for rows in self._known if rows < num_rows]
        more = [rows for rows in self._known if rows > num_rows]
        if not fewer:
            return self._known[min(more)]
        low, high = (max(fewer), min(more)) if more else (min(fewer), max(fewer))
        slope = (self._known[high] - self._known[low]) / (high - low) if high > low else 0.0
        if more:
            return self._known[low] + slope * (num_rows - low)
        return self._known[high] + max(0.0, slope) * (num_rows - high)


@dataclass(slots=True)
class Pace:
    """`Pace` learns from one worker's decode steps."""

    objective_s: float | None = None  # per output token
    row_times: RowTimes = field(default_factory=RowTimes)
    token_s: float = _INITIAL_TOKEN_S  # of a prompt token beside them
    # Of prompts that waited in a router's queue for this worker when it last sent one. None: prompts may wait for
    # prefill workers, and what this one computes beside answers are exceptions.
    tokens_behind: int | None = None

    def observe(self, batch: Batch, output: StepOutput) -> None:
        """Learn from a finished step; one that verifies drafts tells of neither kind of token."""
        if batch.has_drafts:
            return
        num_rows = sum(row.kind is RowKind.DECODE for row in batch.rows)
        self.learn(output.step_s - output.swap_s, num_chunk_tokens=output.num_tokens - num_rows, num_rows=num_rows)

    def learn(self, step_s: float, *, num_chunk_tokens: int, num_rows: int) -> None:
        if num_chunk_tokens:
            # No part of a step is the chunk's for sure: beside rows that take most of what a step may, even a quarter
            # is more than it takes, and each step would take along less than the one before.
            value = max(0.0, step_s - self.decode_s(num_rows)) / num_chunk_tokens
            weight = _SMOOTHING * min(1.0, num_chunk_tokens / _WHOLE_CHUNK)
            self.token_s += weight * (min(value, _OUTLIER * self.token_s) - self.token_s)
            self.token_s = max(_LEAST_TOKEN_S, self.token_s)
        elif num_rows:
            self.row_times.learn(num_rows, step_s)

    def decode_s(self, num_rows: int) -> float:
        """Return what a step takes in which these rows feed one token each; of none, what one takes."""
        return self.row_times.of(num_rows)

    def room_s(self, num_rows: int, prompts: list[int]) -> float:
        """Return the seconds that may come between two tokens of so many answers beside their own step.

        `prompts`: tokens of each prompt here that is not ready, without what was found in a cache. Those that wait
        elsewhere are taken to be as long.
        """
        answers = RunningAnswers(num_rows, self.decode_s(num_rows), self.decode_s(1))
        waiting = None
        if self.tokens_behind is not None:
            here = sum(prompts)
            seconds = (here + self.tokens_behind) * self.token_s
            waiting = WaitingPrompts(seconds, len(prompts) * (1 + self.tokens_behind / max(1, here)))
        return max(0.0, longest_step_s(self.objective_s, answers, waiting) - answers.step_s)

    def chunk_tokens(self, num_rows: int, prompts: list[int]) -> int:
        """Return how many prompt tokens a step takes along that has so many rows of running answers."""
        return max(MIN_CHUNK_TOKENS, int(self.room_s(num_rows, prompts) / self.token_s))


def chunk_rows(pending: list[Sequence], budget: int) -> list[BatchRow]:
    """Return chunks of the sequences that still compute known tokens, of `budget` tokens at most. The oldest is first.

    The oldest has half of the budget for itself, so that it moves on whatever comes; the rest goes to those with the
    least left, so that short prompts do not wait for long ones.
    """
    shares = dict.fromkeys(pending, 0)
    if len(pending) > 1:
        shares[pending[0]] = min(budget // 2, pending[0].num_computable_tokens)
        budget -= shares[pending[0]]
    for seq in sorted(pending, key=lambda seq: seq.num_uncomputed_tokens):
        num_tokens = min(budget, seq.num_computable_tokens - shares[seq])
        shares[seq] += num_tokens
        budget -= num_tokens
    return [BatchRow(seq, num_tokens) for seq, num_tokens in shares.items() if num_tokens]
