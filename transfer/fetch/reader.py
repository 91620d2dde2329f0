"""One rank's reads of blocks that lie elsewhere, driven by the transfer thread alone.

    begin ─> posted piece by piece ─> polled ─┬─> all is here: its sums, done
                                              └─> a piece failed, or give_up: failed ─> nothing may land any more: over

The blocks that are read into belong to the read until it is done or over. A piece that has failed, and one that
nobody waits for any more, may still land: the one until our agent is replaced, the other until it ends. Whether what is
here may be used is decided in `fetches.py`, which knows the lease.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ...common import failpoints
from ...common.clock import Clock
from ...common.config import TransferConfig
from ...common.errors import TransferError
from ...common.kv_spec import KVCacheSpec
from ...wire.fields import BlockIds
from ...wire.grants import RegionInfo, Regions
from ..backends.base import Piece, TransferBackend, TransferHandle, TransferState
from ..backends.peers import Peers
from ..protocol.checksums import PageSums, open_sums
from ..protocol.handoff import pages_of
from ..protocol.peer_log import PeerLog
from ..protocol.rank_messages import ReadOutcome

if TYPE_CHECKING:
    import torch

MAX_IN_FLIGHT_BYTES = 64 << 20  # of one read
MAX_READ_BYTES = 8 << 20  # on one host a post is the copy: writes and leases are looked after between two
FAILED_AFTER_S = 2.0  # that our agent's other work gets, before the agent is replaced for a failed read's sake
STUCK_AFTER_S = 10.0  # that our agent gets where a read neither ends nor fails
MIN_INTERVAL_S = 5.0  # between two of our agents
_GIVEN_UP_POLL_S = 0.02

_Pages = npt.NDArray[np.int32]


Tell = Callable[[int, ReadOutcome, bytes], None]  # fetch id, outcome, sums (where asked for)


class _Piece(NamedTuple):
    """One post: pages [first, end) of its read."""

    handle: TransferHandle
    first: int
    end: int
    agent: str  # of ours


@dataclass(slots=True, eq=False)
class _Read:
    """One read of some blocks, in all layers."""

    fetch_id: int
    kv_address: str
    region: RegionInfo
    local: _Pages
    remote: _Pages  # pairwise
    slots: _Pages  # whose block each page is of
    sums: npt.NDArray[np.uint64] | None  # of each block's pages, as they came
    num_posted: int = 0
    pieces: list[_Piece] = field(default_factory=list)  # under way
    in_flight_bytes: int = 0
    ends_since: float | None = None  # it will not be done
    failed_agents: set[str] = field(default_factory=set)  # of ours, through which something may still land


class KVReader:
    """Owner of one rank's reads."""

    def __init__(
        self,
        *,
        rank: int,
        backend: TransferBackend,
        spec: KVCacheSpec,
        tp_size: int,
        num_blocks: int,
        clock: Clock,
        peers: Peers,
        tell: Tell,
        sums: PageSums | None = None,
        max_in_flight_bytes: int = MAX_IN_FLIGHT_BYTES,
        max_read_bytes: int = MAX_READ_BYTES,
    ) -> None:
        """`num_blocks`: of our own pages. `sums`: over them, where checksums are made."""
        self._rank = rank
        self._backend = backend
        self._spec = spec
        self._page_bytes = spec.page_bytes(tp_size)
        self._pieces = (Piece(0, 0, self._page_bytes),)  # whole pages: the rank there has the same heads
        self._num_blocks = num_blocks
        self._clock = clock
        self._peers = peers
        self._tell = tell
        self._sums = sums
        self._max_in_flight_bytes = max_in_flight_bytes
        self._max_read_pages = max(1, max_read_bytes // self._page_bytes)
        self._reads: dict[int, _Read] = {}
        self._next_agent_at = 0.0
        self.made_progress = False  # in the last step: the next need not wait
        self.num_bytes = 0  # read since start
        self._log = PeerLog("prefix_read_failed")
        peers.needs(self._needed)

    def _needed(self) -> Iterator[str]:
        return (read.region.agent for read in self._reads.values())

    @property
    def num_unfinished(self) -> int:
        return len(self._reads)

    def begin(
        self,
        fetch_id: int,
        kv_address: str,
        ranks: Regions,
        ours: BlockIds,
        theirs: BlockIds,
        num_thin: int,
        wants_sums: bool,
    ) -> None:
        """Read blocks of theirs into blocks of ours, pairwise, in all layers; the first `num_thin` as thin ones. From
        the rank with our number.
        """
        assert fetch_id not in self._reads and len(ours) == len(theirs)
        region = ranks[self._rank]
        local, slots = pages_of(self._spec, ours, self._num_blocks, num_thin)
        remote, _ = pages_of(self._spec, theirs, region.num_blocks, num_thin)
        order = np.argsort(local)  # so that neighbours merge
        has_sums = wants_sums and self._sums is not None
        self._reads[fetch_id] = _Read(
            fetch_id,
            kv_address,
            region,
            local=local[order],
            remote=remote[order],
            slots=slots[order],
            sums=np.zeros(len(ours), dtype=np.uint64) if has_sums else None,
        )

    def give_up(self, fetch_id: int) -> None:
        """Nobody wants it any more. Idempotent."""
        read = self._reads.get(fetch_id)
        if read is not None and read.ends_since is None:
            read.ends_since = self._clock.now()

    # --- the transfer thread's turn -----------------------------------------------------------------------------

    def step(self) -> float | None:
        """Post, poll, tell. Seconds until the next call is wanted; None: only after another call."""
        self.made_progress = False
        for read in list(self._reads.values()):
            if read.ends_since is None:
                self._post(read)
            self._poll(read)
            self._settle(read)
        if not self._reads:
            return None
        return 0.0 if any(read.ends_since is None for read in self._reads.values()) else _GIVEN_UP_POLL_S

    def _post(self, read: _Read) -> None:
        """One piece, if there is one to post and room for it."""
        first = read.num_posted
        end = min(len(read.local), first + self._max_read_pages)
        if first == end or read.in_flight_bytes >= self._max_in_flight_bytes:
            return
        if failpoints.armed:
            failpoints.hit("fetch.read")
        try:
            self._peers.connect(read.kv_address, read.region, self._pieces)
        except TransferError as error:
            self._fail(read, f"connecting: {error}")
            return
        try:
            local, remote = read.local[first:end].tolist(), read.remote[first:end].tolist()
            handle = self._backend.read(read.region.agent, local, remote)
        except TransferError as error:
            self._fail(read, str(error), self._backend.agent if error.may_land else None)
            return
        read.num_posted = end
        read.pieces.append(_Piece(handle, first, end, self._backend.agent))
        read.in_flight_bytes += handle.num_bytes
        self.made_progress = True

    def _poll(self, read: _Read) -> None:
        under_way, read.pieces = read.pieces, []
        for piece in under_way:
            state = self._backend.poll(piece.handle)
            if state is TransferState.PENDING:
                read.pieces.append(piece)
                continue
            self._backend.release(piece.handle)
            self.made_progress = True
            read.in_flight_bytes -= piece.handle.num_bytes
            if state is TransferState.FAILED:
                self._fail(read, "a piece failed", piece.agent)
            else:
                self.num_bytes += piece.handle.num_bytes
                self._sum(read, piece)

    def _sum(self, read: _Read, piece: _Piece) -> None:
        """Sum a piece while it is in the core's cache."""
        if read.sums is not None and self._sums is not None and read.ends_since is None:
            ours, theirs = read.local[piece.first : piece.end], read.remote[piece.first : piece.end]
            self._sums.add(read.sums, read.slots[piece.first : piece.end], ours, theirs, ((0, self._page_bytes),))

    def _fail(self, read: _Read, why: str, agent: str | None = None) -> None:
        """End a read. `agent`: through which something may still land."""
        if agent is not None:
            read.failed_agents.add(agent)
        if read.ends_since is None:
            read.ends_since = self._clock.now()
            self._log.warn(read.kv_address, "posted" if read.num_posted else "nothing posted", detail=why)
            self._tell(read.fetch_id, ReadOutcome.FAILED, b"")

    def _settle(self, read: _Read) -> None:
        read.failed_agents &= {self._backend.agent}  # what was on its way to an agent that is gone goes nowhere
        if read.pieces or read.failed_agents:
            return
        if read.ends_since is not None:
            del self._reads[read.fetch_id]
            self._tell(read.fetch_id, ReadOutcome.OVER, b"")
        elif read.num_posted == len(read.local):
            del self._reads[read.fetch_id]
            self._tell(read.fetch_id, ReadOutcome.DONE, as_bytes(read.sums) if read.sums is not None else b"")

    # --- our agent ----------------------------------------------------------------------------------------------

    def wants_new_agent(self, now: float) -> bool:
        """Nothing but the end of our agent ends some of them."""
        return now >= self._next_agent_at and any(
            now - read.ends_since >= (STUCK_AFTER_S if read.pieces else FAILED_AFTER_S)
            for read in self._reads.values()
            if read.ends_since is not None
        )

    def agent_replaced(self, now: float) -> None:
        """Note that our agent is gone, whether or not there is a new one."""
        self._next_agent_at = now + MIN_INTERVAL_S


class BlockSums:
    """`BlockSums` sums the pages of lent blocks on one rank: the other side of a read's sums."""

    def __init__(self, sums: PageSums, spec: KVCacheSpec, tp_size: int, num_blocks: int) -> None:
        self._sums = sums
        self._spec = spec
        self._page_bytes = spec.page_bytes(tp_size)
        self._num_blocks = num_blocks

    def make(self, blocks: tuple[int, ...], num_thin: int) -> bytes:
        """8 bytes for each block, over all layers; of the first `num_thin` without those that have windows."""
        found = np.zeros(len(blocks), dtype=np.uint64)
        pages, slots = pages_of(self._spec, blocks, self._num_blocks, num_thin)
        self._sums.add(found, slots, pages, pages, ((0, self._page_bytes),))
        return as_bytes(found)


def open_block_sums(config: TransferConfig, pages: torch.Tensor, spec: KVCacheSpec, tp_size: int) -> BlockSums | None:
    """One rank's; None: no checksums are made. Raises ConfigError."""
    sums = open_sums(config, pages)
    return BlockSums(sums, spec, tp_size, pages.shape[1]) if sums is not None else None


def as_bytes(sums: npt.NDArray[np.uint64]) -> bytes:
    return sums.astype("<u8").tobytes()
