"""One promise of blocks on the decode side, and the states it passes through.

    GRANTED ──KVOpen──> OPEN ──all pairs arrived──> ARRIVED ──admitted──> ADOPTED ──finished──> RELEASED
       │                  │                            │                                           ^ ^
       │                  └──abort, lease, KVClosed──> DOOMED ──every writer ended, or fenced──────┘ │
       └──abort, never opened────────────────────────────────────────────────────────────────────────┘

From OPEN to the end of DOOMED another process may write into the blocks, whatever was said to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ...common.errors import InvalidTransition
from ...common.request import BlockId, RequestSpec
from ...kvcache.thin import name_at
from ...wire.grants import GrantInfo
from ...wire.results import ChoiceTokens
from ..protocol.handoff import num_granted_thin
from .processes import ProcessWatch


class ReservationState(Enum):
    GRANTED = "granted"  # blocks are set aside; nobody may write
    OPEN = "open"  # one prefill worker may write
    ARRIVED = "arrived"  # it wrote everything and writes no more; waits for room in the batch
    ADOPTED = "adopted"  # a sequence owns the blocks
    DOOMED = "doomed"  # given up while the writer may still write: the blocks are in quarantine
    RELEASED = "released"  # over


_NEXT: dict[ReservationState, frozenset[ReservationState]] = {
    ReservationState.GRANTED: frozenset({ReservationState.OPEN, ReservationState.RELEASED}),
    ReservationState.OPEN: frozenset({ReservationState.ARRIVED, ReservationState.DOOMED}),
    ReservationState.ARRIVED: frozenset({ReservationState.ADOPTED, ReservationState.RELEASED}),
    ReservationState.ADOPTED: frozenset({ReservationState.RELEASED}),
    ReservationState.DOOMED: frozenset({ReservationState.RELEASED}),
    ReservationState.RELEASED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Writer:
    """The one prefill worker that opened a grant, and what its ranks have told."""

    open_id: int
    session: str
    worker_id: str
    incarnation: int
    tp_size: int
    expected: frozenset[tuple[int, int]]  # (source rank, decode rank) pairs
    opened_at: float
    has_checksums: bool = False  # its arrivals carry them
    process_watch: ProcessWatch | None = None  # None: on another host, or it copies nothing by itself
    arrived: set[tuple[int, int]] = field(default_factory=set)
    ended_ranks: set[int] = field(default_factory=set)  # source ranks that will write nothing more
    detached_ranks: set[int] = field(default_factory=set)  # of which only a network may still carry something

    @property
    def has_ended(self) -> bool:
        return len(self.ended_ranks) == self.tp_size

    @property
    def is_dead(self) -> bool:
        """Tell whether the writer's processes were watched and have ended."""
        return self.process_watch is not None and self.process_watch.has_ended

    @property
    def is_behind_network(self) -> bool:
        """Tell whether what it may still write comes through our agents: then it is gone with them."""
        return (
            self.process_watch is None
            or self.process_watch.has_ended
            or len(self.detached_ranks | self.ended_ranks) == self.tp_size
        )


@dataclass(slots=True, eq=False)
class Reservation:
    """Blocks for one attempt's prompt: `hit_blocks` were cached, `block_ids` are to be written."""

    spec: RequestSpec
    router_id: str
    grant: GrantInfo
    block_hashes: list[bytes]  # of the prompt's full blocks
    hit_blocks: list[BlockId]
    block_ids: list[BlockId]
    copy_blocks: list[BlockId]  # for the other choices' copies of a partial last block
    deadline: float  # GRANTED: to be opened by then; OPEN: end of the lease
    since: float  # when the state was entered
    state: ReservationState = ReservationState.GRANTED
    writer: Writer | None = None
    first_tokens: tuple[ChoiceTokens, ...] = ()
    num_cached_by_writer: int = 0  # tokens of the prompt that it had not to compute
    retains_prefix: bool = True  # the prompt's KV, for requests to come; False: the prefill worker does

    def names(self) -> list[bytes]:
        """Return the names by which the prompt's full blocks are published."""
        return [name_at(self.block_hashes, place, self.num_thin) for place in range(len(self.block_hashes))]

    def advance(self, to: ReservationState, now: float) -> None:
        if to not in _NEXT[self.state]:
            raise InvalidTransition(f"reservation {self.grant.grant_id.epoch}: {self.state.value} to {to.value}")
        self.state, self.since = to, now

    @property
    def num_thin(self) -> int:
        """Count the leading blocks that may be thin, or come so."""
        return self.grant.spec.num_left_out(self.num_tokens)

    @property
    def num_tokens(self) -> int:
        """The prompt's length, also where a resumed request has outputs."""
        return self.grant.num_tokens

    @property
    def num_cached_tokens(self) -> int:
        return self.grant.num_computed_tokens

    @property
    def num_new_blocks(self) -> int:
        """Taken from the pool for this reservation alone."""
        return len(self.block_ids) + len(self.copy_blocks)

    @property
    def num_new_thin(self) -> int:
        """Count those of them that come thin: the first ones."""
        return num_granted_thin(self.grant)

    @property
    def is_promise(self) -> bool:
        """Blocks are bound, and may yet be filled or not."""
        return self.state in (ReservationState.GRANTED, ReservationState.OPEN)
