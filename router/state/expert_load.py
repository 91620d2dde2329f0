"""An `ExpertLoad` tells how evenly a worker's experts are chosen, by its reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from ...common.imbalance import imbalance
from ...wire.workers import ExpertCounts, ExpertLoads


@dataclass(frozen=True)
class ExpertLoad:
    """A worker's two latest reports, as one. What costs thousands of sums is worked out once."""

    total: ExpertLoads  # since its start
    recent: ExpertLoads  # between the two

    @classmethod
    def after(cls, before: ExpertLoad | None, total: ExpertLoads) -> ExpertLoad:
        """Return what is known with one report more."""
        if before is None or list(map(_shape, before.total)) != list(map(_shape, total)):
            return cls(total, total)
        return cls(total, tuple(map(_minus, total, before.total)))

    @property
    def num_choices(self) -> int:
        return sum(sum(layer.taken) for layer in self.total)

    @cached_property
    def imbalance(self) -> float:
        """Return the choices of each layer's busiest expert over those of a mean one; 1: all are chosen alike."""
        return imbalance([layer.taken for layer in self.recent])

    @cached_property
    def rank_imbalance(self) -> float | None:
        """Return the same of ranks; None where each has a part of every expert. A step takes so much longer."""
        loads = [layer.of_ranks for layer in self.recent if layer.of_ranks]
        return imbalance(loads) if loads else None


def most_uneven(loads: Iterable[ExpertLoad | None]) -> dict[str, float | None] | None:
    """Return the largest imbalances of all workers; None where none of them has told of experts."""
    known = [load for load in loads if load is not None]
    of_ranks = [load.rank_imbalance for load in known if load.rank_imbalance is not None]
    if not known:
        return None
    return {"imbalance": max(load.imbalance for load in known), "rank_imbalance": max(of_ranks, default=None)}


def _shape(layer: ExpertCounts) -> tuple[int, int, int]:
    return (layer.layer, len(layer.taken), len(layer.of_ranks))


def _minus(now: ExpertCounts, before: ExpertCounts) -> ExpertCounts:
    taken = tuple(one - other for one, other in zip(now.taken, before.taken, strict=True))
    of_ranks = tuple(one - other for one, other in zip(now.of_ranks, before.of_ranks, strict=True))
    return ExpertCounts(now.layer, taken, of_ranks)
