"""A run of an engine is one step, or many decode steps of the same rows whose times are an arithmetic series."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import sqrt

from ..common.batch import Batch, RowKind
from ..engine.samples import step_sample
from ..sizing.steps import StepWork
from ..wire.workers import StepSample


@dataclass(slots=True, eq=False)
class Step:
    """One step that runs, or a jump of `num_steps` equal ones; the blocks of `done` of them are taken."""

    batch: Batch
    work: StepWork
    start_s: float
    num_steps: int
    most_steps: int  # until the first of the rows ends
    first_s: float  # time of the first one
    slope_s: float  # each later one takes so much more than the one before it
    block_tokens: int
    swap_s: float = 0.0  # of a single step, for copies from and to host memory
    draft_s: float = 0.0  # of a single step, that a draft model takes
    done: int = 0
    grows_s: float = 0.0  # when the next block is taken
    sampled: int = 0  # of the jump's steps, those that samples were taken of
    version: int = 0
    stopped_s: float | None = None  # when nobody wanted a single step any more
    fills: list[int] | None = None  # of a jump: after how many steps each row's blocks are full, in order

    def step_s(self, number: int) -> float:
        """Return how long the step takes that follows so many."""
        return self.first_s + self.slope_s * number

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

    @property
    def is_plain(self) -> bool:
        """Tell whether its steps are sampled, as `worker.steps.Steps` has it."""
        return bool(self.batch.rows) and not self.batch.has_drafts

    def sample(self, number: int) -> StepSample:
        """Return what is known of the step that follows so many."""
        work, seconds = self.work, self.step_s(number) - self.swap_s
        context = work.decode_context + number * work.decode_rows
        return StepSample(seconds, work.prefill_tokens, work.prefill_pairs, work.decode_rows, context)

    def growth(self, num_steps: int) -> int:
        """Blocks that the rows take from the jump's start until so many steps are over, to be in the next one."""
        size = self.block_tokens
        if self.fills is None:  # as long as nothing was taken
            seqs = [row.seq for row in self.batch.rows]
            self.fills = sorted(len(seq.block_table) * size - seq.num_computed_tokens for seq in seqs)
        rounds, rest = divmod(num_steps, size)
        if self.fills[-1] <= size:
            return rounds * len(self.fills) + bisect_right(self.fills, rest)
        return sum((num_steps - fill) // size + 1 for fill in self.fills if fill <= num_steps)

    def next_growth(self) -> int:
        """Return after how many steps, of more than are done, some row takes a block, or may do so."""
        assert self.fills is not None
        size = self.block_tokens
        if self.fills[-1] > size:
            return self.done + 1
        rounds, rest = divmod(self.done, size)
        place = bisect_right(self.fills, rest)
        return (rounds + place // len(self.fills)) * size + self.fills[place % len(self.fills)]

    def _inverse(self, seconds: float) -> int:
        """About how many steps take so long: the larger root of the series' sum."""
        if self.slope_s <= 0:
            return int(seconds / self.first_s)
        linear = self.first_s - self.slope_s / 2
        return int((sqrt(linear * linear + 2 * self.slope_s * seconds) - linear) / self.slope_s)


def work_of(batch: Batch) -> StepWork:
    """Return the work of a batch. A row that verifies reads its context once, for all of its tokens."""
    found = step_sample(batch)
    drafting = [row for row in batch.rows if row.kind is RowKind.VERIFY]
    return StepWork(
        found.prefill_tokens,
        found.prefill_pairs,
        found.decode_rows + len(drafting),
        found.decode_context + sum(row.end for row in drafting),
        sum(row.num_scheduled_tokens - 1 for row in batch.rows if row.kind is not RowKind.CHUNK),
    )
