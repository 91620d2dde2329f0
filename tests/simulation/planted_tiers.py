"""Planted bugs of prefix fetches, loans, checksums, and the tiers below the device."""

from __future__ import annotations

from typing import Any

from kvferry.decode.role import DecodeRole
from kvferry.kvcache.blocks import BlockPool
from kvferry.kvcache.demotion import Demotion
from kvferry.kvcache.disk_tier import DiskResult, DiskTier
from kvferry.kvcache.prefix_cache import PrefixCache
from kvferry.kvcache.tiers import TierIndex
from kvferry.transfer.fetch.fetch import FetchState
from kvferry.transfer.fetch.fetches import Fetches
from kvferry.transfer.fetch.lending import Lending
from kvferry.transfer.fetch.reader import KVReader
from kvferry.transfer.protocol.handoff import Verdict
from kvferry.transfer.protocol.rank_messages import ReadOutcome
from kvferry.transfer.receive.arrivals import Arrivals
from kvferry.wire.fetches import KVFetch, KVFetchable
from kvferry.worker import parts
from kvferry.worker.core import WorkerCore

from . import workers
from .planting import Planted

# --- fetches ------------------------------------------------------------------------------------------------


class _PublishesUnread(Fetches):
    """What is asked for can be found as soon as it is promised."""

    def _on_fetchable(self, fetch: Any, part: Any, message: KVFetchable) -> None:
        super()._on_fetchable(fetch, part, message)
        for block, block_hash in zip(part.blocks, part.hashes, strict=False):
            if fetch.state is FetchState.READING:
                self._pool.publish(block, block_hash)


class _ForgetsLeases(Fetches):
    """What was read is used, however long ago it was promised."""

    def _on_fetchable(self, fetch: Any, part: Any, message: KVFetchable) -> None:
        super()._on_fetchable(fetch, part, message)
        part.deadline = self._clock.now() + 1e9


class _ReusesGivenUp(Fetches):
    """Blocks into which a read may still land are free."""

    def _give_back(self, part: Any) -> None:
        if part.waits_for:
            self._reading.give_up(part.fetch_id)
        self._pool.free(part.blocks)


class _TakesAnySums(Fetches):
    """What has another checksum than it had over there is used."""

    def _settle(self, fetch: Any, part: Any) -> None:
        if len(part.their_sums) == len(part.our_sums):
            part.our_sums = dict(part.their_sums)
        super()._settle(fetch, part)


class _ForgetsHeld(Fetches):
    """The leading blocks that a fetch holds stay held when it ends."""

    def _end(self, fetch: Any) -> None:
        fetch.held = []
        super()._end(fetch)


class _NeverLate(Fetches):
    """A fetch waits for its answer for ever."""

    def tick(self) -> None:
        """Nobody looks at the time."""


def _over_at_once(self: KVReader, read: Any) -> None:
    """A read that has failed is over, though its pieces are under way."""
    if read.ends_since is not None:
        del self._reads[read.fetch_id]
        self._tell(read.fetch_id, ReadOutcome.OVER, b"")
    else:
        _settle_read(self, read)


_settle_read = KVReader._settle


# --- loans --------------------------------------------------------------------------------------------------


class _LendsUnpinned(Lending):
    """Lent blocks may be evicted."""

    def _lend(self, session: str, message: KVFetch, blocks: Any) -> None:
        super()._lend(session, message, blocks)
        self._pool.free(blocks)
        self._leases[message.fetch_id].blocks = []


class _LendsForever(Lending):
    """A loan whose reader says nothing does not end."""

    def tick(self) -> None:
        """No lease is over."""


class _LendsForTwice(Lending):
    """The reader is told a longer lease than the one that is kept."""

    def _lend(self, session: str, message: KVFetch, blocks: Any) -> None:
        super()._lend(session, message, blocks)
        lease = self._leases[message.fetch_id]
        lease.deadline = self._clock.now() + 0.001


# --- checksums ----------------------------------------------------------------------------------------------


def _believe(self: Arrivals, reservation: Any, rank: int, message: Any, verdict: Verdict) -> None:
    _on_arrived(self, reservation, rank, message, Verdict.INTACT)


_on_arrived = Arrivals.on_arrived


# --- tiers --------------------------------------------------------------------------------------------------


class _OneRegion(TierIndex):
    """The cache's slots are those of swapped sequences."""

    def __init__(self, num_slots: int, first_slot: int = 0) -> None:
        super().__init__(num_slots, 0)


class _EvictsPinned(TierIndex):
    """What is being read may be evicted."""

    def pin(self, block_hash: bytes) -> None:
        """Nobody counts."""

    def unpin(self, block_hash: bytes) -> None:
        """Nobody counts."""


class _TakesFailedReads(DiskTier):
    """A block that the disk could not read is there all the same."""

    def _take(self, result: DiskResult) -> None:
        if not result.task.is_write and result.error:
            result = DiskResult(result.task, "", result.took_s)
        super()._take(result)


def _promote_late(self: PrefixCache, found: Any, table: Any) -> None:
    """A hit in host memory is a hit, and nothing is copied."""


def _keep_pinned(self: Demotion) -> None:
    """Blocks that a step copies out stay pinned after it."""
    self.pinned = []
    _end_demotion(self)


_end_demotion = Demotion.end


def _free_with_content(self: BlockPool, blocks: Any) -> None:
    """What lay in a block before is copied out, whoever has been given it meanwhile."""
    displaced = dict(self.displaced)
    _free_blocks(self, blocks)
    self.displaced |= displaced


_free_blocks = BlockPool.free


# --- roles --------------------------------------------------------------------------------------------------


def _drop_answers(self: WorkerCore, role: str) -> None:
    """A role change ends the answers that run."""
    _set_role(self, role)
    for request in list(self.decode._requests._running.values()):
        self.decode._requests.end(request)


_set_role = WorkerCore.set_role


class _RoleForgetsWaiting(DecodeRole):
    """A role change forgets the promises that prompts are being shipped to."""

    @property
    def is_active(self) -> bool:
        return self.receiver.is_active

    @is_active.setter
    def is_active(self, on: bool) -> None:
        self.receiver.is_active = on
        for reservation in list(self.receiver.reservations.live.values()) if not on else []:
            self.receiver.abort(reservation.spec.request_id, reservation.spec.attempt)


def _replaced(owner: object, name: str, value: object) -> tuple[tuple[object, str, object], ...]:
    return ((owner, name, value),)


_CONTENT = frozenset({"F2", "H2"})
BUGS = (
    Planted("fetched blocks are found unread", frozenset({"F1", "F2"}), _replaced(parts, "Fetches", _PublishesUnread)),
    Planted("a fetch forgets its lease", _CONTENT | {"F4"}, _replaced(parts, "Fetches", _ForgetsLeases), 200),
    Planted(
        "given up blocks are used again", frozenset({"F1", "I2"}), _replaced(parts, "Fetches", _ReusesGivenUp), 300
    ),
    Planted("any sums of a fetch are taken", _CONTENT, _replaced(parts, "Fetches", _TakesAnySums), 400),
    Planted("a fetch keeps what it held", frozenset({"I2", "I15"}), _replaced(parts, "Fetches", _ForgetsHeld)),
    Planted("a fetch is never late", frozenset({"F3"}), _replaced(parts, "Fetches", _NeverLate), 200),
    Planted("a failed read is over at once", frozenset({"F1"}), _replaced(KVReader, "_settle", _over_at_once), 400),
    Planted("lent blocks are not pinned", _CONTENT | {"F4"}, _replaced(parts, "Lending", _LendsUnpinned), 200),
    Planted("loans do not end", frozenset({"I15", "I16"}), _replaced(parts, "Lending", _LendsForever), 200),
    Planted("a loan is shorter than told", _CONTENT | {"F4"}, _replaced(parts, "Lending", _LendsForTwice), 200),
    Planted("any bytes are adopted", _CONTENT, _replaced(Arrivals, "on_arrived", _believe), 200),
    Planted("tier and swap share slots", _CONTENT, _replaced(workers, "TierIndex", _OneRegion), 200),
    Planted(
        "what is promoted is evicted",
        frozenset({"F2", "H2", "I1", "crash"}),
        _replaced(workers, "TierIndex", _EvictsPinned),
        200,
    ),
    Planted("failed disk reads are taken", _CONTENT, _replaced(workers, "DiskTier", _TakesFailedReads), 400),
    Planted("hits in host memory are not copied", _CONTENT, _replaced(PrefixCache, "promote", _promote_late), 200),
    Planted("demoted blocks stay pinned", frozenset({"I2", "I3"}), _replaced(Demotion, "end", _keep_pinned), 200),
    Planted(
        "blocks given back are copied out", frozenset({"F5"}), _replaced(BlockPool, "free", _free_with_content), 400
    ),
    Planted("a role change ends answers", frozenset({"I19"}), _replaced(WorkerCore, "set_role", _drop_answers)),
    Planted(
        "a role change forgets open handoffs", frozenset({"I19"}), _replaced(parts, "DecodeRole", _RoleForgetsWaiting)
    ),
)
