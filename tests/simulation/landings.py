"""What holds where bytes land and where a prompt's KV is taken over: H1 to H4, H6, F1 to F4, and I5 of leases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvferry.transfer.fetch.fetch import FetchState
from kvferry.transfer.receive.reservation import Reservation, ReservationState
from kvferry.wire.fields import Message
from kvferry.wire.handoff import KVOpened

from .breach import Breach
from .fabric import Flight

if TYPE_CHECKING:
    from .workers import Worker


class Landings:
    """One worker's rights: who may write into its blocks, and into which blocks of its own it may read."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._opened: dict[int, int] = {}  # epoch -> the open id that was answered with KVOpened
        core = worker.core
        self._adopt = core.receiver.adopt
        core.receiver.adopt = self._check_adopted  # type: ignore[method-assign]
        self._unlent: set[int] = set()  # blocks of ours whose last read found pages that were not lent any more
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

    def check_landing(self, flight: Flight, blocks: set[int]) -> None:
        """H1, H3, H6: these blocks are about to be written by another worker."""
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

    def lends(self, blocks: set[int]) -> bool:
        return blocks <= {block for held in self._worker.core.lending.references() for block in held}

    def check_fetched(self, flight: Flight, blocks: set[int], *, was_lent: bool) -> None:
        """F1: what we read is about to land in these blocks of ours."""
        (self._unlent.difference_update if was_lent else self._unlent.update)(blocks)
        worker = self._worker
        fetches = worker.core.fetches
        parts = [fetch.part for fetch in fetches._fetches.values() if fetch.part is not None]
        given_up = {block for held in fetches._given_up.references() for block in held}
        held = given_up.union(*(part.blocks for part in parts))
        text = f"{worker.place} reads from {flight.source.place} into blocks {sorted(blocks)}"
        if not blocks <= held:
            raise Breach("F1", f"{text}, of which no fetch holds {sorted(blocks - held)}")
        if any(worker.pool.ref_count(block) != 1 or block in worker.pool._hash_of for block in blocks):
            raise Breach("F1", f"{text}, one of which others have")
        worker.world.tally.seen["reads that land after they were given up"] += not blocks.isdisjoint(given_up)

    def _check_adopted(self, reservation: Reservation) -> tuple[list[int], list[int]]:
        """H2: all of the prompt's KV is here."""
        worker, spec = self._worker, reservation.spec
        worker.world.pass_point("adopt", worker)
        answer = worker.world.oracles[spec.request_id].answers[spec.choices[0]]
        blocks = reservation.hit_blocks + reservation.block_ids
        worker.memory.check(blocks, answer, spec.num_prompt_tokens, f"{worker.place}, adopting {spec.request_id},")
        for follower in worker.followers:
            follower.check_adopted(reservation, answer)
        return self._adopt(reservation)

    def _settle_fetch(self, fetch: Any, part: Any) -> None:
        self._is_settling = True
        self._settle(fetch, part)
        self._is_settling = False

    def _check_published(self, block: int, block_hash: bytes, *, spare: bool = False) -> None:
        """F2: one hash has one content, on whatever worker it is found. F4: it was lent while it was read."""
        worker = self._worker
        if self._is_settling and block in self._unlent:
            raise Breach("F4", f"{worker.place} publishes block {block}, whose pages were read after their lease")
        self._publish(block, block_hash, spare=spare)
        worker.world.contents.check(worker.place, block, block_hash, worker.memory.block(block))
