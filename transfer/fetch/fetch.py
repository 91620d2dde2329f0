"""One fetch: its state and the part of it that is under way, and each reason for which it may bring too little.

ASKING ─KVFetchable─> READING ─done, lease not over─> CHECKING ─sums agree, published─> ASKING for more, or ENDED
  │                      │                               │
  └─refused, no answer───┴─failed, lease over, late──────┴─other sums─> ENDED with what there is
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from ...common.errors import InvalidTransition
from ...common.request import BlockId
from ...kvcache.thin import forms, name_at
from ...wire.tasks import FetchFrom

_ANSWER_SHARE = 0.5  # of the time that a fetch has: whoever lends answers between steps, or may be gone


class FetchState(Enum):
    ASKING = "asking"  # the next part was asked for
    READING = "reading"  # blocks of ours wait for it, every rank reads its share
    CHECKING = "checking"  # all is here within its lease; the other side's sums are waited for, if there are any
    ENDED = "ended"  # nothing is pinned; what may still land does so in blocks that are given up


_NEXT: dict[FetchState, frozenset[FetchState]] = {
    FetchState.ASKING: frozenset({FetchState.READING, FetchState.ENDED}),
    FetchState.READING: frozenset({FetchState.CHECKING, FetchState.ENDED}),
    FetchState.CHECKING: frozenset({FetchState.ASKING, FetchState.ENDED}),
    FetchState.ENDED: frozenset(),
}


class FetchFailure(Enum):
    """A reason why a fetch ended with less than it was to bring."""

    REFUSED = "refused"  # by the lender, in words
    NO_ANSWER = "no_answer"  # to the question, in half of the time that there is
    MISFIT = "misfit"  # the answer cannot be what was asked for, or promises no checksums where they are needed
    NO_ROOM = "no_room"  # for the blocks, here
    LEASE_OVER = "lease_over"  # before all was here
    LATE = "late"  # the router gave it no more time
    READ_FAILED = "read_failed"  # on some rank
    OTHER_SUMS = "other_sums"  # than the lender's
    EVICTED = "evicted"  # the rest is not there any more
    PEER_LOST = "peer_lost"  # the control connection


@dataclass(slots=True, eq=False)
class Part:
    """Neighbouring blocks that are asked for together, and read under one lease."""

    fetch_id: int
    first: int  # place of the first in the prompt
    hashes: list[bytes]
    num_thin: int  # leading ones that are read thin; more than there are: all
    asked_at: float
    kv_address: str
    deadline: float | None = None  # of the lease; None: not answered
    blocks: list[BlockId] = field(default_factory=list)  # ours
    has_checksums: bool = False
    waits_for: set[int] = field(default_factory=set)  # ranks that may still write into the blocks
    our_sums: dict[int, bytes] = field(default_factory=dict)  # by rank
    their_sums: dict[int, bytes] = field(default_factory=dict)

    def name(self, place: int) -> bytes:
        """Return the name by which one of its blocks is published."""
        return name_at(self.hashes, place, self.num_thin)


@dataclass(slots=True, eq=False)
class Fetch:
    """One prompt's: what it is to bring, what it has brought, and the part that is under way."""

    key: str
    source: FetchFrom
    hashes: Sequence[bytes]  # of all that is to be here
    on_end: Callable[[], None]
    began_at: float
    num_thin: int = 0  # leading blocks of which thin ones will do
    held: list[BlockId] = field(default_factory=list)  # leading blocks that we have, pinned until the end
    num_found: int = 0  # leading blocks that need not be asked for
    num_parts: int = 0  # that came
    num_bytes: int = 0
    is_spare: bool = False  # another worker keeps the prompt's KV
    part: Part | None = None
    state: FetchState = FetchState.ASKING

    def part_of(self, hashes: list[bytes], fetch_id: int, now: float) -> Part:
        """Make the next part: of these blocks, the first that are not found."""
        num_thin = max(0, self.num_thin - self.num_found)
        self.part = Part(fetch_id, self.num_found, hashes, num_thin, now, self.source.kv_address)
        return self.part

    def next_forms(self) -> list[bytes]:
        """Return the names of the first block that is not found, of which either will do."""
        return forms(self.hashes, self.num_found, self.num_thin)

    def advance(self, to: FetchState) -> None:
        if to not in _NEXT[self.state]:
            raise InvalidTransition(f"fetch for {self.key}: {self.state.value} to {to.value}")
        self.state = to

    def failure_at(self, now: float) -> FetchFailure | None:
        """Say which of its time limits is over; None: none is."""
        part = self.part
        if now - self.began_at >= self.source.within_s:
            return FetchFailure.LATE
        if part is None:
            return None
        if self.state is FetchState.ASKING and now - part.asked_at >= _ANSWER_SHARE * self.source.within_s:
            return FetchFailure.NO_ANSWER
        is_over = part.deadline is not None and now >= part.deadline
        return FetchFailure.LEASE_OVER if self.state is FetchState.READING and is_over else None
