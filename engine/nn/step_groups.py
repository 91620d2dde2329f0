"""`StepGroups` tell which adapter each row of a product has; `add_groups_` is what torch adds to these rows.

StepGroups.begin, turn_to     the rows of a step, of a tile of it
StepGroups.given              some of these rows: those that an expert is given
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.adapter import NO_ADAPTER
from ..weights.slot_matrices import LinearPart


@dataclass(frozen=True, slots=True)
class Group:
    """Tokens of one adapter among those of a product."""

    slot: int
    tokens: slice | Tensor  # packed tokens, int64


class StepGroups:
    """The adapters of the tokens that are being computed, all of a step's or a tile of them."""

    def __init__(self) -> None:
        self.current: Sequence[Group] = ()
        self.whole = False  # products are made of all rows, of as many at a time whoever they are, and taken from those
        self._slots: Tensor | None = None  # of the current rows, without padding; None: no row has an adapter
        self._tiles: list[Tensor] = []
        self._tile_groups: list[list[Group]] = []

    def begin(self, slots: Tensor | None, *, tile: int | None = None) -> None:
        """Take a step's slots, [num_tokens]; None: no row has an adapter. With `tile`, `turn_to` follows."""
        self.whole = tile is not None
        self.current, self._slots, self._tiles, self._tile_groups = (), None, [], []
        if slots is not None and tile is None:
            self.current, self._slots = _groups(slots), slots
        elif slots is not None and tile is not None:
            self._tiles = list(torch.split(slots, tile))
            self._tile_groups = [_groups(part) for part in self._tiles]

    def turn_to(self, tile: int) -> None:
        """Let the next products be those of a tile's tokens."""
        if self._tiles:
            self.current, self._slots = self._tile_groups[tile], self._tiles[tile]

    def slots(self, num_rows: int) -> Tensor | None:
        """Return the slots of the current rows, which are so many with their padding; None: no row has an adapter."""
        if self._slots is None:
            return None
        return F.pad(self._slots, (0, num_rows - len(self._slots)), value=NO_ADAPTER)

    @contextmanager
    def given(self, slots: Tensor | None) -> Iterator[None]:
        """Let products be those of other rows, which have these slots, and then those of the current ones again."""
        before = self.current, self._slots
        self.current, self._slots = () if slots is None else _groups(slots), slots
        try:
            yield
        finally:
            self.current, self._slots = before


def _groups(slots: Tensor) -> list[Group]:
    """Group the tokens of each slot; neighbours are a slice, which costs no copy. `slots`: [num_tokens]."""
    groups = []
    for slot in sorted(set(slots.tolist()) - {NO_ADAPTER}):
        tokens = (slots == slot).nonzero().flatten()
        first, last = int(tokens[0]), int(tokens[-1]) + 1
        groups.append(Group(slot, slice(first, last) if last - first == len(tokens) else tokens))
    return groups


def add_groups_(
    y: Tensor,
    x: Tensor,
    step: StepGroups,
    parts: Sequence[LinearPart],
    factors: Callable[[int, int], tuple[Tensor, Tensor] | None],
) -> Tensor:
    """Add to a linear's y what the adapters of its rows make of x. `factors`: A and B of a part and a slot."""
    for group in step.current:
        rows = x if step.whole else x[group.tokens]
        for index, part in enumerate(parts):
            if (pair := factors(index, group.slot)) is None:
                continue
            added = (rows @ pair[0].T) @ pair[1].T
            target = y[:, part.rows]
            if step.whole:
                added = added[group.tokens]
            if isinstance(group.tokens, slice):
                target[group.tokens] += added
            else:
                target.index_add_(0, group.tokens, added)
    return y
