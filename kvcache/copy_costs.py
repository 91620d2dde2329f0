"""Costs as steps have shown them: seconds for a block's copy to or from host memory, and for a prompt token."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.batch import Batch, RowKind, StepOutput

_SMOOTHING = 0.3  # weight of the newest step: larger follows a change sooner, smaller is moved less by an outlier


@dataclass(slots=True)
class CopyCosts:
    block_s: float | None = None  # one block, one way
    token_s: float | None = None

    def observe(self, batch: Batch, output: StepOutput) -> None:
        """Learn from a finished step. A token's price is known from steps that are mostly chunks."""
        num_copied = len(batch.swap_out) + len(batch.swap_in)
        if num_copied:
            self.block_s = smooth(self.block_s, output.swap_s / num_copied)
        if not batch.rows or batch.rows[-1].kind is not RowKind.CHUNK:
            return
        num_chunk_tokens = sum(row.num_scheduled_tokens for row in batch.rows if row.kind is RowKind.CHUNK)
        if 2 * num_chunk_tokens >= output.num_tokens:
            self.token_s = smooth(self.token_s, (output.step_s - output.swap_s) / output.num_tokens)

    def copying_pays(self, num_copies: int, num_tokens: int) -> bool:
        """Is copying blocks sooner done than computing tokens? What is not known yet is learned by copying."""
        if self.block_s is None or self.token_s is None:
            return True
        return num_copies * self.block_s < num_tokens * self.token_s


def smooth(known: float | None, value: float) -> float:
    return value if known is None else known + _SMOOTHING * (value - known)
