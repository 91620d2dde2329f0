"""Preempted sequences' KV in host memory: which block lies in which slot, and whether that is worth its copies.

    preempted ── save ──> out: the next step copies blocks to slots ──> saved
    saved ── load ──> into: the next step copies slots to blocks ──> loaded: the slots are free when it has ended
    saved ── drop ──> the sequence ended, or its blocks are found in the prefix cache

Pure: the copies themselves are the engine's (`kvcache/host_slots.py`). A BlockPool of its own hands out slots.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..common.request import BlockId, Sequence
from .blocks import BlockPool
from .copy_costs import CopyCosts


@dataclass(slots=True)
class Saved:
    """One sequence's KV that lies in slots, or will with the next step."""

    num_tokens: int  # whose KV existed when it was preempted
    slots: dict[int, int]  # by place in the block table; shared blocks that stayed on the device have none


@dataclass(slots=True)
class SwapSpace:
    """Knows sequences and slots, no block's content."""

    num_slots: int
    costs: CopyCosts = field(default_factory=CopyCosts)
    num_saved_blocks: int = 0  # since start
    num_loaded_blocks: int = 0
    out: list[tuple[BlockId, int]] = field(default_factory=list)  # of the next step
    into: list[tuple[int, BlockId]] = field(default_factory=list)
    _pool: BlockPool = field(init=False)
    _saved: dict[Sequence, Saved] = field(default_factory=dict)
    _loading: dict[Sequence, Saved] = field(default_factory=dict)  # with the next step
    _loaded: list[int] = field(default_factory=list)  # slots that the running step reads

    def __post_init__(self) -> None:
        self._pool = BlockPool(self.num_slots, 1, enable_prefix_caching=False)

    @property
    def num_used(self) -> int:
        return self._pool.num_owned_blocks

    def saved(self, seq: Sequence) -> Saved | None:
        return self._saved.get(seq)

    def is_loading(self, seq: Sequence) -> bool:
        """Tell whether the next step loads it."""
        return seq in self._loading

    def num_saved_tokens(self, seq: Sequence) -> int:
        saved = self._saved.get(seq)
        return 0 if saved is None else saved.num_tokens

    def wants(self, num_blocks: int, num_tokens: int) -> bool:
        """Tell whether there is room for that many blocks, and swapping them pays."""
        if not 0 < num_blocks <= self._pool.num_free_blocks:
            return False
        return self.costs.copying_pays(2 * num_blocks, num_tokens)  # out, and in again

    def save(self, seq: Sequence, places: list[int], blocks: Iterable[BlockId]) -> None:
        """Copy the `blocks` that stand at `places` of the sequence's table out with the next step."""
        slots = self._pool.allocate(len(places))
        self._saved[seq] = Saved(seq.num_computed_tokens, dict(zip(places, slots, strict=True)))
        self.out += zip(blocks, slots, strict=True)
        self.num_saved_blocks += len(places)

    def load(self, seq: Sequence, targets: dict[int, BlockId]) -> None:
        """Copy the slots of the places in `targets` into these blocks with the next step; the others are free."""
        saved = self._saved.pop(seq)
        self._pool.free([slot for place, slot in saved.slots.items() if place not in targets])
        saved.slots = {place: saved.slots[place] for place in targets}
        self.into += ((saved.slots[place], block) for place, block in targets.items())
        self._loading[seq] = saved
        self.num_loaded_blocks += len(targets)

    def take_back(self, seq: Sequence) -> bool:
        """Preempted again before the step that would have loaded it: its slots hold all that there is. False: it is
        not being loaded."""
        saved = self._loading.pop(seq, None)
        if saved is None:
            return False
        slots = set(saved.slots.values())
        self.into = [pair for pair in self.into if pair[0] not in slots]
        self._saved[seq] = saved
        return True

    def drop(self, seq: Sequence) -> None:
        """Give the sequence's slots back. Idempotent."""
        saved = self._saved.pop(seq, None)
        if saved is not None:
            self._pool.free(list(saved.slots.values()))

    def begin(self) -> tuple[list[tuple[BlockId, int]], list[tuple[int, BlockId]]]:
        """Return the copies of the step that begins now."""
        out, into = self.out, self.into
        self._loaded = [slot for slot, _ in into]
        self._loading.clear()
        self.out, self.into = [], []
        return out, into

    def end(self) -> None:
        """Take in the end of the step: what it loaded is on the device."""
        self._pool.free(self._loaded)
        self._loaded = []

    def check(self) -> None:
        """Assert that every slot is free or somebody's."""
        self._pool.check()
        owned = [
            slot for book in (self._saved, self._loading) for saved in book.values() for slot in saved.slots.values()
        ]
        assert sorted(owned + self._loaded) == sorted(s for s in range(self.num_slots) if self._pool.ref_count(s))
