"""A journal of what a worker's caches have gained and lost, sent to its routers ten times a second.

    BlockPool, tiers ─ stored, evicted ─> CacheJournal ─ drain ─> CacheChange messages, numbered for each session

Only what is true at the drain is told: a block that came and went in between never shows up. A router's session begins
with all that is stored; so does a session that goes on after more has changed than the journal keeps. Hints, no more:
what a router believes about a cache may cost time and never a wrong token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from ..wire.workers import CacheChange
from .blocks import BlockPool
from .disk_tier import DISK
from .prefix_cache import PrefixCache

DEVICE = "device"  # the tier of the block pool
MAX_HASHES = 8192  # of one message
_MAX_CHANGES = 1 << 17  # between two drains; beyond it, everything is told anew


class CacheJournal:
    """`CacheJournal` is not thread-safe: its owner holds the worker's lock."""

    def __init__(self, max_changes: int = _MAX_CHANGES) -> None:
        self._max_changes = max_changes
        self._tiers: dict[str, Callable[[], Iterable[bytes]]] = {}
        self._changes: dict[str, dict[bytes, bool]] = {}  # by tier: what is stored now, and what no longer is
        self._num_changes = 0
        self._has_overflown = False
        self._next_seq: dict[str, int] = {}  # by router; 0: it is told everything

    def add_tier(self, tier: str, stored: Callable[[], Iterable[bytes]]) -> None:
        """Add a tier; `stored()` names all that the tier holds, whenever a router has to be told everything."""
        self._tiers[tier] = stored
        self._changes[tier] = {}

    def stored(self, block_hash: bytes, tier: str = DEVICE) -> None:
        """Note that the tier has this block from now on."""
        self._note(tier, block_hash, True)

    def evicted(self, block_hash: bytes, tier: str = DEVICE) -> None:
        """Note that the tier has the block no more."""
        self._note(tier, block_hash, False)

    def _note(self, tier: str, block_hash: bytes, is_stored: bool) -> None:
        if self._num_changes < self._max_changes:
            self._changes[tier][block_hash] = is_stored
            self._num_changes += 1
        else:
            self._has_overflown = True

    def router_joined(self, router_id: str) -> None:
        """Begin the session of a router: its first message tells everything."""
        self._next_seq[router_id] = 0

    def router_left(self, router_id: str) -> None:
        self._next_seq.pop(router_id, None)

    def drain(self) -> Iterator[tuple[str, CacheChange]]:
        """Yield what each router is to be told, in this order. Taken as a whole before anything else changes."""
        changes = list(self._take())
        everything = None
        for router_id, seq in self._next_seq.items():
            if seq == 0 and everything is None:
                everything = list(self._all())
            told = everything if seq == 0 and everything is not None else changes
            for number, (tier, stored, evicted) in enumerate(told, seq):
                yield router_id, CacheChange(seq=number, stored=stored, evicted=evicted, tier=tier)
            self._next_seq[router_id] = seq + len(told)

    def _take(self) -> Iterator[tuple[str, bytes, bytes]]:
        if self._has_overflown:
            self._next_seq = dict.fromkeys(self._next_seq, 0)
        for tier, changes in self._changes.items():
            entries = iter(changes.items())
            while part := dict(islice(entries, MAX_HASHES)):
                stored = b"".join(key for key, is_stored in part.items() if is_stored)
                yield tier, stored, b"".join(key for key, is_stored in part.items() if not is_stored)
            changes.clear()
        self._num_changes, self._has_overflown = 0, False

    def _all(self) -> Iterator[tuple[str, bytes, bytes]]:
        """Yield all that is stored, in messages, of which there is always a first."""
        yield DEVICE, b"", b""
        for tier, stored in self._tiers.items():
            hashes = iter(list(stored()))
            while part := b"".join(islice(hashes, MAX_HASHES)):
                yield tier, part, b""


def open_journal(pool: BlockPool, cache: PrefixCache) -> CacheJournal:
    """Begin a journal of what a worker's pool and the tiers below it hold."""
    journal = CacheJournal()
    journal.add_tier(DEVICE, pool.published)
    pool.listener = journal
    journal.add_tier("host", cache.host.__iter__)
    if cache.disk is not None:
        journal.add_tier(DISK, cache.disk.readable)
    cache.report_to(journal)
    return journal
