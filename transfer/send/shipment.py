"""One shipment of one source rank: what is to be written where, how far it is, and the states it passes through.

    OPENING ──KVOpened──> SHIPPING ──all written, first tokens known──> TOLD ──KVDone──> ENDED
       │                     │                                                            ^ ^
       │                     ├──abort, lease over, connection lost──> CLOSING ──written───┘ │
       └──refused, late──────┴──a write failed──────────────────────────────────────────────┘

Pages are appended as they are computed; every decode rank has a cursor of its own into the same list.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from ...common.errors import InvalidTransition
from ...wire.grants import GrantInfo, RegionInfo
from ...wire.results import ChoiceTokens
from ...wire.workers import TransferReport
from ..backends.base import Piece
from ..protocol.checksums import ShipmentSums
from ..protocol.handoff import num_thin_behind


class ShipmentState(Enum):
    OPENING = "opening"  # KVOpen is under way; nothing may be posted
    SHIPPING = "shipping"  # posts what is complete while the lease lasts
    TOLD = "told"  # all is written, KVArrived is repeated until somebody answers
    CLOSING = "closing"  # posts nothing more, waits for what was posted
    ENDED = "ended"  # over


_NEXT: dict[ShipmentState, frozenset[ShipmentState]] = {
    ShipmentState.OPENING: frozenset({ShipmentState.SHIPPING, ShipmentState.ENDED}),
    ShipmentState.SHIPPING: frozenset({ShipmentState.TOLD, ShipmentState.CLOSING, ShipmentState.ENDED}),
    ShipmentState.TOLD: frozenset({ShipmentState.ENDED}),
    ShipmentState.CLOSING: frozenset({ShipmentState.ENDED}),
    ShipmentState.ENDED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Target:
    """One decode rank that this rank writes to."""

    region: RegionInfo
    pieces: tuple[Piece, ...]
    sums: ShipmentSums | None = None  # of what was posted there; None: no checksums are made
    num_posted: int = 0  # pages; those before it in the shipment's list were written here, once

    @property
    def page_bytes(self) -> int:
        """Bytes of a page that this rank writes there."""
        return sum(piece.num_bytes for piece in self.pieces)


@dataclass(slots=True, eq=False)
class Shipment:
    """The pages of one prompt under one open."""

    open_id: int
    request_id: str
    attempt: int
    grant: GrantInfo
    targets: list[Target]
    answered_at: float  # when the lease was last heard of, or KVOpen was sent
    deadline: float  # nothing is posted from then on
    since: float  # when the state was entered
    state: ShipmentState = ShipmentState.OPENING
    local_pages: array[int] = field(default_factory=lambda: array("i"))
    remote_pages: array[int] = field(default_factory=lambda: array("i"))  # pairwise; the same on every decode rank
    num_writes: int = 0  # posted and not ended
    finished: bool = False  # every page is complete and the first tokens are known
    first_tokens: tuple[ChoiceTokens, ...] = ()
    num_cached_tokens: int = 0  # of the prompt: that were not computed
    announced_at: float = 0.0
    reason: str = ""  # why it closes
    num_bytes: int = 0  # written
    first_post_at: float | None = None
    last_done_at: float | None = None
    computed_at: float | None = None  # the last layer's
    is_known: npt.NDArray[np.bool_] = field(init=False)  # of each remote page: was given, and is so once per open

    def __post_init__(self) -> None:
        self.is_known = np.zeros(self.grant.spec.num_layers * self.remote_num_blocks, dtype=np.bool_)

    def add_pages(self, local: npt.NDArray[np.int32], remote: npt.NDArray[np.int32]) -> None:
        """Complete from now on: to be written, pairwise."""
        assert len(local) == len(remote), f"{len(local)} pages for {len(remote)}"
        assert not self.is_known[remote].any(), f"page {remote[self.is_known[remote]][0]} was shipped before"
        self.is_known[remote] = True
        self.local_pages.frombytes(local.tobytes())
        self.remote_pages.frombytes(remote.tobytes())

    def finish(self, first_tokens: tuple[ChoiceTokens, ...], num_cached_tokens: int) -> None:
        """Every page was given, and the first tokens are known."""
        num_pages, expected = len(self.remote_pages), self.num_expected_pages
        assert num_pages == expected, f"{num_pages} pages of {expected} were given"
        self.finished, self.first_tokens, self.num_cached_tokens = True, first_tokens, num_cached_tokens

    def advance(self, to: ShipmentState, now: float) -> None:
        if to not in _NEXT[self.state]:
            raise InvalidTransition(f"shipment {self.open_id:x}: {self.state.value} to {to.value}")
        self.state, self.since = to, now

    @property
    def peer(self) -> tuple[str, int]:
        """The decode worker: id and incarnation."""
        return (self.grant.grant_id.worker_id, self.grant.grant_id.incarnation)

    @property
    def remote_num_blocks(self) -> int:
        """Return the number of blocks in the decode worker's pool, on each of its ranks."""
        return self.grant.ranks[0].num_blocks

    @property
    def is_live(self) -> bool:
        """Tell whether it holds or wants the right to write: the source pages are read."""
        return self.state in (ShipmentState.OPENING, ShipmentState.SHIPPING)

    @property
    def is_posted(self) -> bool:
        """Every page that is complete so far was posted to every target."""
        return all(target.num_posted == len(self.local_pages) for target in self.targets)

    @property
    def wants_turn(self) -> bool:
        """Tell whether it has something to post or to tell, or its last word may still need progress to leave."""
        if self.state is ShipmentState.SHIPPING:
            return not self.is_posted
        return self.state in (ShipmentState.TOLD, ShipmentState.CLOSING)

    @property
    def num_expected_pages(self) -> int:
        grant, count = self.grant, len(self.grant.block_ids)
        first = grant.num_computed_tokens // grant.spec.block_size
        return grant.spec.num_pages(count, num_thin_behind(grant.spec, grant.num_tokens, first, count))

    def report(self, clean: bool) -> TransferReport:
        """Report what crossed, and how long its reader waited for it."""
        first, last, computed = self.first_post_at, self.last_done_at, self.computed_at
        return TransferReport(
            request_id=self.request_id,
            attempt=self.attempt,
            decode_worker=self.grant.grant_id.worker_id,
            num_bytes=self.num_bytes,
            num_blocks=len(self.grant.block_ids),
            transfer_s=last - first if first is not None and last is not None else 0.0,
            exposed_s=max(0.0, last - computed) if last is not None and computed is not None else 0.0,
            clean=clean,
        )
