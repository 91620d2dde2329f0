"""A run of an engine is one step, or many decode steps of the same rows whose times are an arithmetic series."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import sqrt

from ..common.batch import Batch, RowKind
from .costs.steps import StepWork
from .decode import DecodePart
from .prefill import PrefillPart


@dataclass(slots=True, eq=False)
class Step:
    """One step that runs, or a jump of `num_steps` equal ones of which `done` are in the books."""

    part: PrefillPart | DecodePart
    batch: Batch
    work: StepWork
    start_s: float
    num_steps: int
    first_s: float  # time of the first one
    slope_s: float  # each later one takes so much more than the one before it
    swap_s: float = 0.0  # of a single step, for copies from and to host memory
    done: int = 0
    sampled: int = 0  # of the jump's steps, those that samples were taken of
    version: int = 0
    fills: list[int] | None = None  # of a jump: after how many steps each row's blocks are full, in order

    def seconds(self, num_steps: int) -> float:
        """Return how long the first `num_steps` steps take."""
        return num_steps * (self.first_s + self.slope_s * (num_steps - 1) / 2)

    def end_s(self, num_steps: int) -> float:
        return self.start_s + self.seconds(num_steps)

    def over(self, now_s: float) -> int:
        """Steps that have ended by then; the last one's end is an event of its own."""
        if self.num_steps == 1:
            return 0
        count, most = self._inverse(now_s - self.start_s), self.num_steps - 1
        while count < most and self.end_s(count + 1) <= now_s:
            count += 1
        while count > 0 and self.end_s(count) > now_s:
            count -= 1
        return max(self.done, min(count, most))

    def growth(self, num_steps: int, block_tokens: int) -> int:
        """Blocks that the rows take from the jump's start until so many steps are over, to be in the next one."""
        if self.fills is None:
            seqs = [row.seq for row in self.batch.rows]
            # From the first step's start on. `done` steps are in the books already.
            self.fills = sorted(
                len(seq.block_table) * block_tokens - seq.num_computed_tokens + self.done for seq in seqs
            )
        rounds, rest = divmod(num_steps, block_tokens)
        if self.fills[-1] <= block_tokens:
            return rounds * len(self.fills) + bisect_right(self.fills, rest)
        return sum((num_steps - fill) // block_tokens + 1 for fill in self.fills if fill <= num_steps)

    def _inverse(self, seconds: float) -> int:
        """About how many steps take so long: the larger root of the series' sum."""
        if self.slope_s <= 0:
            return int(seconds / self.first_s)
        linear = self.first_s - self.slope_s / 2
        return int((sqrt(linear * linear + 2 * self.slope_s * seconds) - linear) / self.slope_s)


@dataclass(slots=True, frozen=True)
class Figures:
    num_steps: int
    busy_for_s: float
    last_step_s: float
    last_step_tokens: int
    num_free_blocks: int
    decode_context: int
    waiting_tokens: int


def work_of(batch: Batch) -> StepWork:
    """Return the work of a batch, as `StepSample` counts it."""
    tokens = pairs = rows = context = 0
    for row in batch.rows:
        count = row.num_scheduled_tokens
        if row.kind is RowKind.DECODE:
            rows += 1
            context += row.end
        else:
            tokens += count
            pairs += count * (row.start + count // 2)
    return StepWork(tokens, pairs, rows, context)
