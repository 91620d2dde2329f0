"""`Pace` says how many prompt tokens a step takes along without keeping running answers waiting, by finished steps.

    step = rows of one token (decode_s) + prompt tokens x token_s        room = what a step may take - decode_s

Pure: times come in with the steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..common.batch import Batch, RowKind, StepOutput
from ..common.pacing import MIN_CHUNK_TOKENS, longest_step_s

_INITIAL_TOKEN_S = 1e-3  # until chunks have been seen
_SMOOTHING = 0.3
_WHOLE_CHUNK = 64  # tokens: what fewer take says more of the step than of them
_OUTLIER = 2.0  # times what is known: one slow step is no new speed


@dataclass(slots=True)
class Pace:
    """`Pace` learns from one worker's decode steps."""

    objective_s: float | None = None  # per output token
    decode_s: float = 0.0  # of steps in which every row feeds one token
    token_s: float = _INITIAL_TOKEN_S  # of a prompt token beside them

    def observe(self, batch: Batch, output: StepOutput) -> None:
        """Learn from a finished step; one that verifies drafts tells of neither kind of token."""
        if batch.has_drafts:
            return
        num_rows = sum(row.kind is RowKind.DECODE for row in batch.rows)
        self.learn(output.step_s - output.swap_s, num_chunk_tokens=output.num_tokens - num_rows, num_rows=num_rows)

    def learn(self, step_s: float, *, num_chunk_tokens: int, num_rows: int) -> None:
        if num_chunk_tokens:
            value = max(step_s - self.decode_s, step_s / 4) / num_chunk_tokens
            weight = _SMOOTHING * min(1.0, num_chunk_tokens / _WHOLE_CHUNK)
            self.token_s += weight * (min(value, _OUTLIER * self.token_s) - self.token_s)
        elif num_rows:
            value = min(step_s, _OUTLIER * self.decode_s) if self.decode_s else step_s
            self.decode_s += (_SMOOTHING if self.decode_s else 1.0) * (value - self.decode_s)

    @property
    def room_s(self) -> float:
        """Return the seconds that may come between two tokens of an answer beside its own step."""
        return max(0.0, longest_step_s(self.objective_s, self.decode_s) - self.decode_s)

    @property
    def chunk_tokens(self) -> int:
        """Prompt tokens for a step that has rows of running answers."""
        return max(MIN_CHUNK_TOKENS, int(self.room_s / self.token_s))
