"""A journal of what a worker's caches have gained and lost, sent to its routers ten times a second.

    BlockPool, tiers ─ stored, evicted ─> CacheJournal ─ drain ─> CacheChange messages, numbered for each session

Only what is true at the drain is told: a block that came and went in between never shows up. A router's session begins
with all that is stored; so does a session that goes on after more has changed than the journal keeps. A large cache is
told in parts, one at a drain behind the changes: of what was stored at the session's begin, what has not changed since.
Hints, no more: what a router believes about a cache may cost time and never a wrong token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NamedTuple

from ..wire.workers import CacheChange
from .blocks import BlockPool
from .disk_tier import DISK
from .prefix_cache import PrefixCache

DEVICE = "device"  # the tier of the block pool
MAX_HASHES = 8192  # of one message
_MAX_CHANGES = 1 << 17  # between two drains; beyond it, everything is told anew
# Of what is stored, at one drain: a megabyte to a router, so that a slow network takes it between two drains. More ends
# a session by what is queued for it, and the next one would begin with the same.
_MAX_TOLD = 1 << 16


class _Told(NamedTuple):
    """Holds what a message says of a tier."""

    tier: str
    stored: bytes
    evicted: bytes = b""


@dataclass(slots=True)
class _Session:
    """A router's: how many messages it has had, and what it has yet to hear of what was stored at its begin."""

    next_seq: int = 0  # 0: it is told everything
    untold: dict[str, Iterator[bytes]] = field(default_factory=dict)  # by tier
    changed: dict[str, set[bytes]] = field(default_factory=dict)  # since the begin: told already, or gone

    def note(self, changes: Mapping[str, Iterable[bytes]]) -> None:
        """Note what the session hears of as changes."""
        if self.untold:
            for tier, hashes in changes.items():
                self.changed.setdefault(tier, set()).update(hashes)

    def next_part(self, num_hashes: int) -> Iterator[_Told]:
        """Yield the next of what is untold. What has changed may be stored no more, and is left out."""
        for tier, untold in list(self.untold.items()):
            changed = self.changed.get(tier, set())
            while num_hashes and (part := list(islice(untold, min(num_hashes, MAX_HASHES)))):
                num_hashes -= len(part)
                if stored := b"".join(key for key in part if key not in changed):
                    yield _Told(tier, stored)
            if num_hashes:
                del self.untold[tier]
        if not self.untold:
            self.changed.clear()


class CacheJournal:
    """`CacheJournal` is not thread-safe: its owner holds the worker's lock."""

    def __init__(self, max_changes: int = _MAX_CHANGES, max_told: int = _MAX_TOLD) -> None:
        self._max_changes = max_changes
        self._max_told = max_told
        self._tiers: dict[str, Callable[[], Iterable[bytes]]] = {}
        self._changes: dict[str, dict[bytes, bool]] = {}  # by tier: what is stored now, and what no longer is
        self._num_changes = 0
        self._has_overflown = False
        self._sessions: dict[str, _Session] = {}  # by router

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
        """Begin the session of a router: it is told everything, from its first message on."""
        self._sessions[router_id] = _Session()

    def router_left(self, router_id: str) -> None:
        self._sessions.pop(router_id, None)

    def drain(self) -> Iterator[tuple[str, CacheChange]]:
        """Yield what each router is to be told, in this order. Taken as a whole before anything else changes."""
        if self._has_overflown:
            self._sessions = {router_id: _Session() for router_id in self._sessions}
        for session in self._sessions.values():
            session.note(self._changes)
        changes = list(self._take())
        everything: dict[str, list[bytes]] | None = None
        for router_id, session in self._sessions.items():
            told = changes
            if session.next_seq == 0:
                if everything is None:
                    everything = {tier: list(stored()) for tier, stored in self._tiers.items()}
                session.untold = {tier: iter(hashes) for tier, hashes in everything.items()}
                told = [_Told(DEVICE, b"")]  # there is always a first message
            for tier, stored, evicted in chain(told, session.next_part(self._max_told)):
                yield router_id, CacheChange(seq=session.next_seq, stored=stored, evicted=evicted, tier=tier)
                session.next_seq += 1

    def _take(self) -> Iterator[_Told]:
        for tier, changes in self._changes.items():
            entries = iter(changes.items())
            while part := dict(islice(entries, MAX_HASHES)):
                stored = b"".join(key for key, is_stored in part.items() if is_stored)
                yield _Told(tier, stored, b"".join(key for key, is_stored in part.items() if not is_stored))
            changes.clear()
        self._num_changes, self._has_overflown = 0, False


def open_journal(pool: BlockPool, cache: PrefixCache) -> CacheJournal:
    """Begin a journal of what a worker's pool and the tiers below it hold."""
    journal = CacheJournal()
    journal.add_tier(DEVICE, pool.published)
    pool.listener = journal
    journal.add_tier("host", cache.host.hashes)
    if cache.disk is not None:
        journal.add_tier(DISK, cache.disk.readable)
    cache.report_to(journal)
    return journal
