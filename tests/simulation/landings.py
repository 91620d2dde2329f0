"""What holds where bytes land and where a prompt's KV is taken over.

H1 to H4, H6, H10, H11, F1 to F4, and I5 of leases.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.transfer.fetch.fetch import FetchState
from kvferry.transfer.receive.reservation import Reservation, ReservationState
from kvferry.wire.fields import Message
from kvferry.wire.grants import GrantId
from kvferry.wire.handoff import KVArrived, KVOpened

from .breach import Breach
from .fabric import Flight
from .heads import heads_of

if TYPE_CHECKING:
    from .workers import Worker


class Landings:
    """One worker's rights: who may write into its blocks, and into which blocks of its own it may read."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._opened: dict[int, int] = {}  # epoch -> the open id that was answered with KVOpened
        core = worker.core
        self._told: dict[tuple[GrantId, int], set[tuple[int, int]]] = {}  # by open: (source rank, our rank)
        self._adopt = core.receiver.adopt
        core.receiver.adopt = self._check_adopted  # type: ignore[method-assign]
        # Blocks of ours, by the rank that read them, whose last read found pages that were not lent any more.
        self._unlent: set[tuple[int, int]] = set()
        self._is_settling = False
        self._settle = core.fetches._settle
        core.fetches._settle = self._settle_fetch  # type: ignore[method-assign]
        self._publish = core.pool.publish
        core.pool.publish = self._check_published  # type: ignore[method-assign, assignment]

    def check_opened(self, message: Message) -> None:
        """H4: a grant is opened for one open id."""
        if isinstance(message, KVOpened):
            epoch = message.grant_id.epoch
            if self._opened.setdefault(epoch, message.open_id) != message.open_id:
                raise Breach("H4", f"{self._worker.place} opens {message.grant_id} for a second open_id")

    def check_leases(self) -> None:
        """I5, after the receiver has looked at its clock."""
        now = self._worker.clock.now()
        for reservation in self._worker.core.receiver.reservations.live.values():
            if reservation.is_promise and now >= reservation.deadline:
                text = f"{reservation.grant.grant_id} is {reservation.state.value}"
                raise Breach("I5", f"{self._worker.place}: {text} {now - reservation.deadline:.1f} s after its lease")

    def check_fetches(self) -> None:
        """F3, after the fetches have looked at their clock."""
        worker = self._worker
        now = worker.clock.now()
        for fetch in worker.core.fetches._fetches.values():
            if now - fetch.began_at >= fetch.source.within_s:
                raise Breach("F3", f"{worker.place} fetches for {fetch.key} for {now - fetch.began_at:.1f} s")
            deadline = fetch.part.deadline if fetch.part is not None else None
            if deadline is not None and fetch.state is FetchState.READING and now >= deadline:
                raise Breach("F3", f"{worker.place} reads for {fetch.key} {now - deadline:.1f} s after its lease")

    def blocks_of(self, pages: Iterable[int]) -> set[int]:
        """Return whose pages these are."""
        memory, pool = self._worker.memory, self._worker.pool
        return {memory.owner_of(page, pool) for page in pages}

    def check_landing(self, flight: Flight, blocks: set[int]) -> None:
        """H1, H3, H6, H10: these blocks are about to be written by another worker."""
        worker, grant_id = self._worker, flight.grant_id
        reservation = None
        if (grant_id.worker_id, grant_id.incarnation) == (worker.place, worker.incarnation):
            reservation = worker.core.receiver.reservations.live.get(grant_id.epoch)
        state = reservation.state if reservation is not None else None
        text = f"{flight.source.place} writes blocks {sorted(blocks)} of {worker.place} under {grant_id}"
        if state not in (ReservationState.OPEN, ReservationState.DOOMED):
            raise Breach("H1", f"{text}, which is {state.value if state is not None else 'over'}")
        assert reservation is not None and reservation.writer is not None
        if reservation.writer.open_id != flight.open_id or not blocks <= set(reservation.block_ids):
            raise Breach("H1", f"{text}: another open, or blocks that are not the grant's")
        worker.world.tally.seen["landings in quarantine"] += state is ReservationState.DOOMED
        if state is ReservationState.DOOMED and not worker.pool._quarantined.issuperset(blocks):
            raise Breach("H3", f"{text}, some of which are not in quarantine")
        if any(block in worker.pool._hash_of for block in blocks):
            raise Breach("H6", f"{text}, one of which is published")
        _check_place(flight)

    def lends(self, blocks: set[int]) -> bool:
        return blocks <= {block for held in self._worker.core.lending.references() for block in held}

    def check_fetched(self, flight: Flight, blocks: set[int], *, was_lent: bool) -> None:
        """F1: what we read is about to land in these blocks of ours."""
        read = {(block, flight.source.rank) for block in blocks}
        (self._unlent.difference_update if was_lent else self._unlent.update)(read)
        _check_place(flight)
        worker = self._worker
        fetches = worker.core.fetches
        parts = [fetch.part for fetch in fetches._fetches.values() if fetch.part is not None]
        given_up = {block for held in fetches.given_up.references() for block in held}
        held = given_up.union(*(part.blocks for part in parts))
        text = f"{worker.place} reads from {flight.source.place} into blocks {sorted(blocks)}"
        if not blocks <= held:
            raise Breach("F1", f"{text}, of which no fetch holds {sorted(blocks - held)}")
        if any(worker.pool.ref_count(block) != 1 or block in worker.pool._hash_of for block in blocks):
            raise Breach("F1", f"{text}, one of which others have")
        worker.world.tally.seen["reads that land after they were given up"] += not blocks.isdisjoint(given_up)

    def _check_adopted(self, reservation: Reservation) -> tuple[list[int], list[int]]:
        """H2, H11: all of the prompt's KV is here, and was told to be."""
        worker, spec = self._worker, reservation.spec
        worker.world.pass_point("adopt", worker)
        self._check_told(reservation)
        answer = worker.world.oracles[spec.request_id].answers[spec.choices[0]]
        blocks = reservation.hit_blocks + reservation.block_ids
        end, reader = spec.num_prompt_tokens, f"{worker.place}, adopting {spec.request_id},"
        worker.memory.check(blocks, answer, end, reader, start=end)
        for follower in worker.followers:
            follower.check_adopted(reservation, answer)
        return self._adopt(reservation)

    def note_told(self, message: KVArrived, rank: int) -> None:
        """A source rank says to one of ours that what it had to write there is written."""
        self._told.setdefault((message.grant_id, message.open_id), set()).add((message.source_rank, rank))

    def _check_told(self, reservation: Reservation) -> None:
        """H11: of each head, or copy, by the rank that has it there."""
        writer, worker = reservation.writer, self._worker
        assert writer is not None
        told = self._told.get((reservation.grant.grant_id, writer.open_id), set())
        missing = _senders(worker.world.scenario.spec, writer.tp_size, worker.num_ranks) - told
        if missing:
            text = f"{worker.place} adopts {reservation.spec.request_id}, and nobody has told"
            raise Breach("H11", f"{text} of (source rank, rank) {sorted(missing)}")

    def _settle_fetch(self, fetch: Any, part: Any) -> None:
        self._is_settling = True
        self._settle(fetch, part)
        self._is_settling = False

    def _check_published(self, block: int, block_hash: bytes, *, spare: bool = False) -> None:
        """F2: one hash has one content, on whatever worker it is found. F4: it was lent while it was read."""
        worker = self._worker
        if self._is_settling and any((block, rank) in self._unlent for rank in range(worker.num_ranks)):
            raise Breach("F4", f"{worker.place} publishes block {block}, whose pages were read after their lease")
        self._publish(block, block_hash, spare=spare)
        worker.world.contents.check(worker.place, block, block_hash, worker.memory.content(block))


def _check_place(flight: Flight) -> None:
    """H10: each run of a page goes where the same heads' keys or values are."""
    if flight.is_misplaced:
        source, target = flight.source, flight.target_agent
        text = f"{source.agent} moves {[tuple(run) for run in flight.runs]} of each page to or from {target}"
        raise Breach("H10", f"{text}, between other heads")


def _senders(spec: KVCacheSpec, num_sources: int, num_ranks: int) -> set[tuple[int, int]]:
    """Return which source ranks have what which of our ranks wait for, counted head by head."""
    if spec.is_replicated:
        return {(rank % num_sources, rank) for rank in range(num_ranks)}
    num_heads, found = spec.num_kv_heads, set()
    for target in range(num_ranks):
        copy = target % max(1, num_ranks // num_heads)
        for head in heads_of(target, num_ranks, num_heads):
            holders = [rank for rank in range(num_sources) if head in heads_of(rank, num_sources, num_heads)]
            found.add((holders[copy % len(holders)], target))
    return found
