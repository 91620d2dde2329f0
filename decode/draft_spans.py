"""`DraftSpans` knows what a draft model has computed of each sequence, and says what it computes in a step.

    target    ....|................|...........x         x: the last known token
    draft     ....|................|......               behind while it drafts nothing, within the last block alone

It is behind where it drafted nothing for a while, for its work would be in vain, and by one token where all that it
drafted was right. Before it drafts it is fed what it lacks, in one forward. No full block lacks anything: those are
cached and shipped, and are made whole in the step that fills them.

Pure. Where a draft model computes is no state of a sequence: it begins with all that the target has computed.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..common.batch import Batch, BatchRow, RowKind
from ..common.request import Sequence


class DraftSpans:
    """`DraftSpans` gives rows their spans and learns from what became of their drafts."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._computed: dict[Sequence, int] = {}  # tokens whose keys and values the draft model has computed
        self.num_prompt_tokens = 0  # that it has computed here

    def assign(self, rows: Iterable[BatchRow]) -> None:
        """Say for a step's rows, whose drafts are chosen, which positions the draft model computes."""
        for row in rows:
            # Rejected tokens lie behind `start`, and after a preemption all that had been computed may. In front of it
            # lie full blocks, which others share: after a preemption more of them may be found than had been computed.
            full = row.start - row.start % self._block_size
            first = self._computed[row.seq] = max(full, min(self._computed.get(row.seq, row.start), row.start))
            is_whole = row.kind is RowKind.CHUNK or row.seq.pending_choices  # a fork begins with a whole copy
            if is_whole or row.end % self._block_size == 0:
                row.draft_span = (first, row.end)
            elif row.draft:
                row.draft_span = (first, row.end - 1)  # the last drafted token is not fed to find another
            else:
                row.draft_span = (row.end, row.end)

    def observe(self, batch: Batch) -> None:
        """Count what a finished step has computed, right or not."""
        for row in batch.rows:
            assert row.draft_span is not None
            first, end = row.draft_span
            self.num_prompt_tokens += max(0, min(end, row.seq.num_prompt_tokens) - first)
            if first < end and row.seq in self._computed:
                self._computed[row.seq] = end

    def forget(self, seq: Sequence) -> None:
        """Drop what is known of a sequence that has ended."""
        self._computed.pop(seq, None)
