"""Books of what lies in which tier below the device, by block hash. Pure: the bytes are copied by others.

    device ── copied out before or while it is evicted ──> host ── written ahead ──> disk
       ^                                                   │  ^                        │
       └──────────────── promoted on a hit ────────────────┘  └──── read on a hit ─────┘

A `TierIndex` is one tier: slots by hash, the least recently used one is evicted. A slot is filled before it is found,
and what is being read or written is pinned. `Lookahead` finds what is next to be evicted above and not kept below, so
that evicting costs nothing when it happens.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from typing import Protocol

IDLE_WINDOW = 2048  # blocks looked at when the engine gets idle: more are found, for a longer look with the lock held


class TierListener(Protocol):
    """A `TierListener` hears what a tier gains and loses."""

    def stored(self, block_hash: bytes, tier: str) -> None: ...
    def evicted(self, block_hash: bytes, tier: str) -> None: ...


class TierIndex:
    """The slots of one tier."""

    def __init__(self, num_slots: int, first_slot: int = 0) -> None:
        self.num_slots = num_slots
        self.version = 0  # how often the order of eviction has changed
        self._first_slot = first_slot
        self._free = list(range(first_slot + num_slots - 1, first_slot - 1, -1))  # taken from the end
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()  # filled; least recently used first
        self._filling: dict[bytes, int] = {}
        self._pins: dict[bytes, int] = {}
        self._listener: TierListener | None = None
        self._tier = ""

    def report_to(self, listener: TierListener, tier: str) -> None:
        """Report to `listener` what comes and goes from now on."""
        self._listener, self._tier = listener, tier

    def __len__(self) -> int:
        """Count the blocks that can be found."""
        return len(self._slot_of)

    def __contains__(self, block_hash: bytes) -> bool:
        """Tell whether the block is here or on its way."""
        return block_hash in self._slot_of or block_hash in self._filling

    def __iter__(self) -> Iterator[bytes]:
        """Yield the hashes that can be found, the next to be evicted first."""
        return iter(self._slot_of)

    def hashes(self) -> Collection[bytes]:
        """Return the hashes that can be found, in no order: that of eviction takes long to follow through millions."""
        return dict.keys(self._slot_of)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_pinned(self) -> int:
        return len(self._pins)

    def find(self, block_hash: bytes) -> int | None:
        """Return the slot that holds the block."""
        return self._slot_of.get(block_hash)

    def is_filling(self, block_hash: bytes) -> bool:
        return block_hash in self._filling

    def reserve(self, block_hash: bytes) -> int | None:
        """Take a slot to fill: a free one, or that of the least recently used block that nobody reads; None if all are.

        It is found from `fill` on, or is free again from `discard` on.
        """
        assert block_hash not in self, block_hash
        slot = self._free.pop() if self._free else self._evict()
        if slot is not None:
            self._filling[block_hash] = slot
        return slot

    def _evict(self) -> int | None:
        victim = next((known for known in self._slot_of if known not in self._pins), None)
        if victim is None:
            return None
        slot = self._slot_of.pop(victim)
        self._gone(victim)
        return slot

    def fill(self, block_hash: bytes) -> None:
        """Make the block one that can be found: its slot holds it now."""
        self._slot_of[block_hash] = self._filling.pop(block_hash)
        self.version += 1
        if self._listener is not None:
            self._listener.stored(block_hash, self._tier)

    def _gone(self, block_hash: bytes) -> None:
        self.version += 1
        if self._listener is not None:
            self._listener.evicted(block_hash, self._tier)

    def restore(self, stored: Iterable[tuple[bytes, int]]) -> None:
        """Enter the blocks that slots held when we came: each hash once, and its slot. There may be a million."""
        slots = dict(stored)
        taken = set(slots.values())
        self._free = [slot for slot in self._free if slot not in taken]
        self._slot_of.update(slots)
        self.version += len(slots)
        if self._listener is not None:
            for block_hash in slots:
                self._listener.stored(block_hash, self._tier)

    def discard(self, block_hash: bytes) -> None:
        """Free the slot, which does not hold the block. Nobody reads it."""
        if block_hash in self._filling:
            slot = self._filling.pop(block_hash)
        else:
            slot = self._slot_of.pop(block_hash)
            self._gone(block_hash)
        assert block_hash not in self._pins, block_hash
        self._free.append(slot)

    def pin(self, block_hash: bytes) -> None:
        """Keep a block that is being read, or is about to be, from being evicted."""
        assert block_hash in self, block_hash
        self._pins[block_hash] = self._pins.get(block_hash, 0) + 1

    def unpin(self, block_hash: bytes) -> None:
        self._pins[block_hash] -= 1
        if not self._pins[block_hash]:
            del self._pins[block_hash]

    def keep_longest(self, block_hash: bytes) -> None:
        """Make the block the last to be evicted: it was used, or nobody else has it any more."""
        if block_hash in self._slot_of:
            self._slot_of.move_to_end(block_hash)
            self.version += 1

    def keep_shortest(self, block_hash: bytes) -> None:
        """Make the block the next to be evicted: the tier above has it as well."""
        if block_hash in self._slot_of:
            self._slot_of.move_to_end(block_hash, last=False)
            self.version += 1

    def check(self) -> None:
        """Assert that each slot is in one place, and that nothing is pinned that is not here."""
        slots = [*self._free, *self._slot_of.values(), *self._filling.values()]
        assert sorted(slots) == list(range(self._first_slot, self._first_slot + self.num_slots)), "a slot is lost"
        assert not self._slot_of.keys() & self._filling.keys()
        assert all(known in self and count > 0 for known, count in self._pins.items())


class Lookahead:
    """The next to be evicted that the tier below lacks. It is looked up again when half of what it saw has changed."""

    def __init__(self) -> None:
        self._queue: deque[bytes] = deque()
        self._seen_version = -1
        self._seen_window = 0

    def __len__(self) -> int:
        """Count the blocks that were seen and not handed out."""
        return len(self._queue)

    def would_look(self, window: int, version: int) -> bool:
        """Tell whether enough has changed for another look."""
        return version - self._seen_version >= 1 + window // 2

    def take(
        self, count: int, *, order: Iterable[bytes], window: int, version: int, is_kept: Callable[[bytes], bool]
    ) -> list[bytes]:
        """Take up to `count` of the first `window` in `order`. They may have gone meanwhile: the caller looks."""
        if self.would_look(window, version):
            self.look(order, window=window, version=version, is_kept=is_kept)
        return [self._queue.popleft() for _ in range(min(count, len(self._queue)))]

    def look(self, order: Iterable[bytes], *, window: int, version: int, is_kept: Callable[[bytes], bool]) -> None:
        """Look for candidates now, unless some are left or there is nothing that was not seen."""
        is_news = version != self._seen_version or window > self._seen_window
        if not self._queue and window > 0 and is_news:
            self._queue.extend(known for known in islice(order, window) if not is_kept(known))
            self._seen_version, self._seen_window = version, window
