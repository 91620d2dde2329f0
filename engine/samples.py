"""Samples of engine steps on their way to the routers: for each of these a bounded, even choice.

loop ─ add ─> one buffer for each router ─ take ─> its next heartbeat
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..common.batch import Batch, RowKind
from ..wire.workers import StepSample

MAX_SAMPLES = 64  # of one heartbeat, as the wire bounds them


def step_sample(batch: Batch, step_s: float = 0.0) -> StepSample:
    """Describe a step whose tokens are not counted as computed yet, and that verifies none."""
    tokens = pairs = rows = context = 0
    for row in batch.rows:
        start, count = row.seq.num_computed_tokens, row.num_scheduled_tokens
        if row.kind is RowKind.DECODE:
            rows += 1
            context += start + count
        elif row.kind is RowKind.CHUNK:
            tokens += count
            pairs += count * (2 * start + count) // 2
    return StepSample(step_s, tokens, pairs, rows, context)


@dataclass(slots=True)
class EvenSamples:
    """Every n-th of what was added, n being the smallest power of two with which they are few enough."""

    _kept: list[StepSample] = field(default_factory=list)
    _num_added: int = 0
    _stride: int = 1

    def add(self, sample: StepSample) -> None:
        if self._num_added % self._stride == 0:
            if len(self._kept) == MAX_SAMPLES:
                self._kept = self._kept[::2]
                self._stride *= 2
            self._kept.append(sample)
        self._num_added += 1

    def take(self) -> tuple[StepSample, ...]:
        """Take what is kept, and begin anew."""
        kept, self._kept = tuple(self._kept), []
        self._num_added, self._stride = 0, 1
        return kept


class RouterSamples:
    """`RouterSamples` keeps one choice for each router that hears this worker's heartbeats."""

    def __init__(self) -> None:
        self._books: dict[str, EvenSamples] = {}

    def add(self, sample: StepSample) -> None:
        for book in self._books.values():
            book.add(sample)

    def take(self, router_id: str) -> tuple[StepSample, ...]:
        """Take what was kept since the router's last heartbeat; its first one begins its book."""
        return self._books.setdefault(router_id, EvenSamples()).take()

    def forget(self, router_id: str) -> None:
        """Drop the book of a router that is gone."""
        self._books.pop(router_id, None)
