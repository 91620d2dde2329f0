"""The handoff's invariants as functions: they hold after every event on the decode side, whatever happened.

    after every event           check_books (H3), check_hits (H5), check_published (H6), check_quarantine (H9), and
                                OpenHistory.check (H4), which remembers what came before
    when a write lands          check_landing (H1)
    before an adoption          check_complete (H2; that the bytes are right is for whoever holds the memory)

They read a KVReceiver and its BlockPool, change nothing and raise AssertionError, saying what is wrong where. The same
functions serve the property tests and the simulation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

from ...common.request import BlockId
from ...kvcache.blocks import BlockPool
from ...kvcache.thin import leading
from .opens import FENCE_AFTER_S
from .receiver import KVReceiver
from .reservation import Reservation, ReservationState

_WRITABLE = (ReservationState.OPEN, ReservationState.DOOMED)


def check_all(receiver: KVReceiver, pool: BlockPool, sequence_blocks: Iterable[Collection[BlockId]] = ()) -> None:
    """Everything that can be seen at one moment. `sequence_blocks`: of each running sequence, where they are known."""
    check_books(receiver, pool, sequence_blocks)
    check_hits(receiver, pool)
    check_published(receiver, pool)
    check_quarantine(receiver)


def check_landing(receiver: KVReceiver, blocks: Collection[BlockId], open_id: int) -> None:
    """H1: a write that lands is the bound open's, and nobody else has its blocks."""
    owners = [found for found in receiver.reservations.live.values() if not set(blocks).isdisjoint(found.block_ids)]
    assert len(owners) == 1, f"a write of open {open_id:x} into blocks {sorted(blocks)} of {len(owners)} reservations"
    owner = owners[0]
    epoch = owner.grant.grant_id.epoch
    assert set(blocks) <= set(owner.block_ids), f"a write of open {open_id:x} beside the blocks of grant {epoch}"
    assert owner.state in _WRITABLE, f"a write into grant {epoch}, which is {owner.state.value}"
    bound = owner.writer.open_id if owner.writer is not None else None
    assert bound == open_id, f"a write of open {open_id:x} into grant {epoch}, which is bound to {bound}"


def check_complete(reservation: Reservation) -> None:
    """H2, the part that messages show: every (source, decode) rank pair has told its arrival."""
    writer = reservation.writer
    epoch = reservation.grant.grant_id.epoch
    assert writer is not None, f"grant {epoch} is adopted and was never opened"
    assert writer.arrived == writer.expected, f"grant {epoch} lacks {sorted(writer.expected - writer.arrived)}"


def check_books(receiver: KVReceiver, pool: BlockPool, sequence_blocks: Iterable[Collection[BlockId]] = ()) -> None:
    """H3: no block is lost, doubled or in two hands; what a writer may reach is neither free nor a sequence's."""
    receiver.check()
    writable: set[BlockId] = set()
    for reservation in receiver.reservations.in_state(*_WRITABLE):
        writable.update(reservation.block_ids)
    quarantined = sum(pool.ref_count(block) == 0 for block in writable)
    assert quarantined == pool.num_quarantined_blocks, f"{quarantined} writable blocks without an owner"
    for blocks in sequence_blocks:
        assert writable.isdisjoint(blocks), f"a sequence has {sorted(writable & set(blocks))}, which may be written"


def check_hits(receiver: KVReceiver, pool: BlockPool) -> None:
    """H5: the cached blocks that a live reservation counts on are held, and still hold what they are known for."""
    for reservation in receiver.reservations.live.values():
        hits = reservation.hit_blocks
        assert all(pool.ref_count(block) > 0 for block in hits), f"hits {hits} are not pinned"
        known = pool.match_prefix(leading(reservation.block_hashes[: len(hits)], pool.knows, reservation.num_thin))
        assert known == hits, f"hits {hits} hold something else now: {known}"


def check_published(receiver: KVReceiver, pool: BlockPool) -> None:
    """H6: what others may find by its hash was adopted, and no writer can reach it."""
    for reservation in receiver.reservations.live.values():
        published = [block for block in reservation.block_ids if pool.is_published(block)]
        assert not published, f"blocks {published} of grant {reservation.grant.grant_id.epoch} are published too early"


def check_quarantine(receiver: KVReceiver) -> None:
    """H9: one bad peer quarantines at most what it had open when it went bad: it opens nothing a second later."""
    doomed_at: dict[int, float] = defaultdict(lambda: float("inf"))
    for reservation in receiver.reservations.in_state(ReservationState.DOOMED):
        assert reservation.writer is not None
        incarnation = reservation.writer.incarnation
        doomed_at[incarnation] = min(doomed_at[incarnation], reservation.since)
    for reservation in receiver.reservations.in_state(*_WRITABLE):
        writer = reservation.writer
        assert writer is not None
        late_s = writer.opened_at - doomed_at[writer.incarnation] - FENCE_AFTER_S
        assert late_s <= 0, f"{writer.worker_id} opened a grant {late_s:.3f} s after it should have been shut out"


class OpenHistory:
    """H4: to each grant at most one open was ever bound, and once it has ended it stays so."""

    def __init__(self) -> None:
        self._bound: dict[tuple[int, int], int] = {}  # by incarnation and epoch
        self._live: set[tuple[int, int]] = set()
        self._ended: set[tuple[int, int]] = set()

    def check(self, receiver: KVReceiver) -> None:
        """Check after every event of one decode worker, whose incarnations may follow each other."""
        live = set()
        for reservation in receiver.reservations.live.values():
            grant_id = reservation.grant.grant_id
            key = (grant_id.incarnation, grant_id.epoch)
            live.add(key)
            assert key not in self._ended, f"grant {key[1]} has ended and is live again"
            if reservation.writer is not None:
                bound = self._bound.setdefault(key, reservation.writer.open_id)
                assert bound == reservation.writer.open_id, f"grant {key[1]} was bound to two opens"
        self._ended |= self._live - live
        self._live = live
