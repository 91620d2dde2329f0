"""Blocks on the local disk: asked for while a prompt waits, read into host memory, promoted from there. Pure.

    waiting prompt ── ask ──> reads into slots of host memory ──> found there        it is scheduled, and promotes
                       └─ slow, failed, spoilt ──> it computes                       counted, never an error
    host memory's next to be evicted ── written ahead ──> found here

The disk does one operation after the other on a thread of its own, behind `Disk`; a step never waits for it. After
several failures in a row it is left alone for a while, in which it counts as empty: to routers and whoever else asks.
A block that is not what was written is forgotten, and no sign of a disk that fails: it was read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from ..common.clock import Clock
from ..common.request import Sequence as TokenSequence
from .copy_costs import smooth
from .tiers import IDLE_WINDOW, Lookahead, TierIndex, TierListener

_MAX_WRITES = 32  # under way: a slow disk keeps so many slots of host memory busy
_MAX_WAIT_S = 1.0  # for a disk whose speed, or ours, is not known yet; longer risks a first token for a hit
# So many failures in a row turn the disk off for so long: fewer and longer lose hits to a hiccup, more and shorter have
# sequences wait for a disk that is broken.
_MAX_FAILURES = 4
_PAUSE_S = 30.0
DISK = "disk"  # the tier as routers know it
SPOILT = "not what was written"  # the error of a read that a disk has carried out


class DiskTask(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One block between its slot in host memory and its slot on disk."""

    is_write: bool
    block_hash: bytes
    host_slot: int
    disk_slot: int


class DiskResult(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    task: DiskTask
    error: str = ""  # empty: done
    took_s: float = 0.0


class Disk(Protocol):
    """A `Disk` carries out tasks, one after the other, on all ranks."""

    num_slots: int
    wake: Callable[[], None]  # called when there is a result, from any thread

    def stored(self) -> Iterable[tuple[bytes, int]]:
        """Return what an earlier process left: each hash once, and its slot. Whether it is intact shows at its read."""
        ...

    def submit(self, task: DiskTask) -> None: ...

    def results(self) -> list[DiskResult]:
        """Take the results of tasks that have ended since the last call."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Ticket:
    """The blocks that a waiting sequence has asked for."""

    hashes: list[bytes]  # pinned in host memory, read already or being read
    until_s: float
    gave_up: bool = False


class DiskTier:
    """`DiskTier` owns the index of host memory together with the prefix cache. Calls hold the worker's lock."""

    def __init__(self, disk: Disk, host: TierIndex, clock: Clock, report: Callable[[DiskResult], None]) -> None:
        """`report` is called with each task that has failed."""
        self.disk = disk
        self.host = host
        self.index = TierIndex(disk.num_slots)
        self._clock = clock
        self._report = report
        self._tickets: dict[TokenSequence, _Ticket] = {}
        self._lookahead = Lookahead()
        self._num_reads = 0  # under way
        self._num_writes = 0
        self._block_s: float | None = None  # one read
        self._num_failed_in_row = 0
        self._paused_until_s: float | None = None
        self._listener: TierListener | None = None
        self.num_failures = 0
        self.num_read_blocks = 0
        self.num_written_blocks = 0
        self.index.restore(disk.stored())

    # --- reading -------------------------------------------------------------------------------------------------

    def has(self, block_hash: bytes) -> bool:
        """Tell whether the block can be read from here, or is being read."""
        if self.host.is_filling(block_hash):
            return True
        return not self._is_paused and self.index.find(block_hash) is not None

    def knows(self, seq: TokenSequence) -> bool:
        return seq in self._tickets

    def ask(self, seq: TokenSequence, hashes: Sequence[bytes], limit_s: Callable[[int], float | None]) -> None:
        """Read blocks for a waiting sequence, as many as host memory can hold beside those of others, if they come
        sooner than they are computed: in `limit_s(number)`.
        """
        ticket = self._tickets[seq] = _Ticket([], self._clock.now())
        self.advance()
        num_asked = sum(len(other.hashes) for other in self._tickets.values())
        hashes = hashes[: self.host.num_slots // 2 - num_asked]
        within_s = limit_s(len(hashes))
        if self._is_paused or (within_s is not None and self._expected_s(len(hashes)) >= within_s):
            return
        for block_hash in hashes:
            if block_hash not in self.host and not self._read(block_hash):
                break
            self.host.pin(block_hash)
            ticket.hashes.append(block_hash)
        ticket.until_s += _MAX_WAIT_S if within_s is None else within_s

    def _expected_s(self, num_blocks: int) -> float:
        """Return how long it takes to read that many more: first come, first read, with writes in between."""
        return (self._block_s or 0.0) * (num_blocks + self._num_reads + self._num_writes)

    def _read(self, block_hash: bytes) -> bool:
        disk_slot = self.index.find(block_hash)
        if disk_slot is None:
            return False
        host_slot = self.host.reserve(block_hash)
        if host_slot is None:
            return False
        self.index.pin(block_hash)
        self._num_reads += 1
        self.disk.submit(DiskTask(False, block_hash, host_slot, disk_slot))
        return True

    def awaits(self, seq: TokenSequence) -> bool:
        ticket = self._tickets[seq]
        if ticket.gave_up:
            return False
        self.advance()
        if not any(self.host.is_filling(block_hash) for block_hash in ticket.hashes):
            return False
        if self._clock.now() < ticket.until_s:
            return True
        ticket.gave_up = True
        self.num_failures += 1
        return False

    def forget(self, seq: TokenSequence) -> None:
        """Let go of what the sequence waits for. Idempotent; what is being read still comes, for others."""
        ticket = self._tickets.pop(seq, None)
        for block_hash in ticket.hashes if ticket is not None else ():
            self.host.unpin(block_hash)

    # --- what has ended, and what is next ------------------------------------------------------------------------

    def advance(self, *, is_idle: bool = False) -> None:
        """Take what has ended. `is_idle`: the engine has nothing else to do."""
        for result in self.disk.results():
            self._take(result)
        if not self._is_paused:
            self._write_ahead(is_idle)

    def _take(self, result: DiskResult) -> None:
        task = result.task
        if task.is_write:
            self._num_writes -= 1
            self.host.unpin(task.block_hash)
            (self.index.discard if result.error else self.index.fill)(task.block_hash)
            self.num_written_blocks += not result.error
        else:
            self._num_reads -= 1
            self.index.unpin(task.block_hash)
            self._take_read(result)
        self._count(result)

    def _take_read(self, result: DiskResult) -> None:
        block_hash = result.task.block_hash
        if not result.error:
            self.host.fill(block_hash)
            self.index.keep_longest(block_hash)
            self._block_s = smooth(self._block_s, result.took_s)
            self.num_read_blocks += 1
            return
        for ticket in self._tickets.values():
            while block_hash in ticket.hashes:
                ticket.hashes.remove(block_hash)
                self.host.unpin(block_hash)
        self.host.discard(block_hash)
        self.index.discard(block_hash)

    def _count(self, result: DiskResult) -> None:
        if not result.error:
            self._num_failed_in_row = 0
            return
        self.num_failures += 1
        self._report(result)
        if result.error == SPOILT:
            return
        self._num_failed_in_row += 1
        if self._num_failed_in_row >= _MAX_FAILURES:
            is_news = self._paused_until_s is None
            self._paused_until_s = self._clock.now() + _PAUSE_S
            if is_news and self._listener is not None:
                for block_hash in self.index:
                    self._listener.evicted(block_hash, DISK)

    @property
    def _is_paused(self) -> bool:
        if self._paused_until_s is not None and self._clock.now() >= self._paused_until_s:
            self._paused_until_s = None
            for block_hash in self.index:
                self.stored(block_hash, DISK)
        return self._paused_until_s is not None

    def _write_ahead(self, is_idle: bool) -> None:
        """Write what host memory evicts next before it is evicted."""
        host, index = self.host, self.index
        window = min(host.num_slots, index.num_slots) // 2 - host.num_free
        if is_idle and index.num_free:
            window = max(window, IDLE_WINDOW)
            self._lookahead.look(host, window=window, version=host.version, is_kept=index.__contains__)
        for block_hash in self._lookahead.take(
            _MAX_WRITES - self._num_writes,
            order=host,
            window=window,
            version=host.version,
            is_kept=index.__contains__,
        ):
            self._write(block_hash)

    def _write(self, block_hash: bytes) -> None:
        host_slot = self.host.find(block_hash)
        if host_slot is None:
            return
        disk_slot = self.index.reserve(block_hash)
        if disk_slot is None:
            return
        self.host.pin(block_hash)
        self._num_writes += 1
        self.disk.submit(DiskTask(True, block_hash, host_slot, disk_slot))

    # --- what others are told ------------------------------------------------------------------------------------

    def report_to(self, listener: TierListener) -> None:
        """Report to `listener` what can be read from here, and what no longer."""
        self._listener = listener
        self.index.report_to(self, DISK)

    def readable(self) -> Iterator[bytes]:
        """Yield the hashes of what can be read from here now."""
        return iter(()) if self._is_paused else iter(self.index.hashes())

    def stored(self, block_hash: bytes, tier: str) -> None:
        """Pass on what the index has gained. Implements `TierListener`, as `evicted`."""
        if self._paused_until_s is None and self._listener is not None:
            self._listener.stored(block_hash, tier)

    def evicted(self, block_hash: bytes, tier: str) -> None:
        if self._paused_until_s is None and self._listener is not None:
            self._listener.evicted(block_hash, tier)

    def check(self) -> None:
        """Assert that the books agree."""
        self.index.check()
        assert self._num_writes >= 0 and self._num_reads >= 0
