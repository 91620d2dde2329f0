"""The decode side of handoffs: reserves blocks, lets one prefill worker write them, and takes them over or gives up.

    reserve ─> GRANTED ─KVOpen─> OPEN ─KVArrived from every (source, decode) rank pair─> ARRIVED ─adopt─> ADOPTED

A grant lets a prefill worker ask, an open lets it write. An open that fails is DOOMED: its blocks stay out of use
until every source rank said that it ended cleanly, or until the writer is fenced. A lease that runs out never frees.
(The states are drawn in `reservation.py`.)

Pure over BlockPool and Clock: no thread, no socket, no tensor. Rank 0 decides for all ranks. The caller holds one
lock around the receiver, the pool and the scheduler.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from ..common.blocks import BlockPool, KVCacheSpec, hash_blocks, prefix_salt
from ..common.clock import Clock
from ..common.config import TransferConfig
from ..common.messages import (
    CancelKV,
    Grant,
    GrantId,
    GrantInfo,
    HandoffDone,
    HandoffFailed,
    KVArrived,
    KVClosed,
    KVDone,
    KVOpen,
    KVOpened,
    KVRefused,
    KVRenew,
    KVRenewed,
    Message,
    NoCapacity,
    RegionInfo,
)
from ..common.request import BlockId, RequestSpec
from .handoff import Endpoint, check_compatible, expected_pairs, is_minted, mint_grant
from .ledger import Ledger
from .reservation import Reservation, ReservationState, Writer

__all__ = ["KVReceiver", "Reservation", "ReservationState"]

FENCE_AFTER_S = 1.0  # a peer with an older quarantine opens nothing more here


class KVReceiver:
    """Owner of the decode worker's reservations."""

    def __init__(
        self,
        *,
        worker_id: str,
        incarnation: int,
        spec: KVCacheSpec,
        tp_size: int,
        pool: BlockPool,
        regions: tuple[RegionInfo, ...],
        kv_address: str,
        config: TransferConfig,
        clock: Clock,
        version: str,
        transport: str,
        to_router: Callable[[str, Message], None],
        to_peer: Callable[[str, Message], None],
    ) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._spec = spec
        self._endpoint = Endpoint(spec, version, transport, tp_size)
        self._pool = pool
        self._regions = regions
        self._kv_address = kv_address
        self._config = config
        self._clock = clock
        self._to_router = to_router
        self._to_peer = to_peer
        self._key = secrets.token_bytes(32)
        self._epoch = 0
        self.ledger = Ledger(pool)
        self.draining = False  # grants and opens nothing more
        self.stale_messages = 0
        self.num_failures = 0  # opens that were doomed by something else than an abort
        self.prefix_queries = 0  # tokens looked up
        self.prefix_hits = 0

    # --- what it holds ------------------------------------------------------------------------------------

    @property
    def arrived(self) -> list[Reservation]:
        """Those that wait for room in the batch, in the order of arrival."""
        return self.ledger.arrived

    @property
    def has_open(self) -> bool:
        """Somebody may write or report an end: notifications must be polled."""
        return bool(self.ledger.in_state(ReservationState.OPEN, ReservationState.DOOMED))

    def holds(self, request_id: str) -> bool:
        """There is a reservation of the request that may still be adopted."""
        return self.ledger.of_request(request_id) is not None

    @property
    def num_granted_blocks(self) -> int:
        """Blocks of promises that may still be filled."""
        return self.ledger.num_granted_blocks

    @property
    def num_quarantined_blocks(self) -> int:
        return self.ledger.num_quarantined_blocks

    @property
    def num_live(self) -> int:
        return len(self.ledger.live)

    def quarantine_s(self, incarnation: int | None = None) -> float:
        """Age of the oldest quarantine (of one prefill worker's incarnation); 0 where there is none."""
        since = [
            reservation.since
            for reservation in self.ledger.in_state(ReservationState.DOOMED)
            if reservation.writer and incarnation in (None, reservation.writer.incarnation)
        ]
        return self._clock.now() - min(since) if since else 0.0

    def check(self) -> None:
        """Assert that the reservations' books and the pool's agree."""
        self.ledger.check()

    # --- reserving ----------------------------------------------------------------------------------------

    def reserve(
        self, spec: RequestSpec, router_id: str, *, max_local_tokens: int = 0, growth_reserve: int = 0
    ) -> Grant | NoCapacity:
        """Blocks for a prompt and for the copies that its choices need; `growth_reserve` blocks stay available.

        A lower attempt of the request ends with it. "held": so little of the prompt is missing here (at most
        `max_local_tokens`, or nothing) that it should be computed here.
        """
        known = self.ledger.of_request(spec.request_id)
        if known is not None and known.spec.attempt == spec.attempt and known.state is ReservationState.GRANTED:
            return Grant(request_id=spec.request_id, attempt=spec.attempt, grant=known.grant)
        if self.ledger.is_stale(spec.request_id, spec.attempt):
            self.stale_messages += 1
            return self._no_capacity(spec, "stale")
        if known is not None:
            self._drop(known, "a newer attempt has begun")
        if self.draining:
            return self._no_capacity(spec, "draining")
        return self._grant(spec, router_id, max_local_tokens, growth_reserve)

    def _grant(
        self, spec: RequestSpec, router_id: str, max_local_tokens: int, growth_reserve: int
    ) -> Grant | NoCapacity:
        num_tokens, block_size = spec.num_prompt_tokens, self._spec.block_size
        salt = prefix_salt(self._spec, spec.cache_salt)
        hashes = hash_blocks(spec.prompt_token_ids(), block_size, salt)
        hits = self._pool.match_prefix(hashes)
        num_cached = len(hits) * block_size
        if num_tokens - num_cached <= max_local_tokens:
            return self._no_capacity(spec, "held", num_cached)
        num_copies = len(spec.choices) - 1 if num_tokens % block_size else 0
        num_total = self._spec.num_blocks_for(num_tokens) + num_copies
        reason = self.ledger.shortage(num_total, hits, growth_reserve)
        if reason is not None:
            return self._no_capacity(spec, reason, num_cached)
        self._pool.pin(hits)
        blocks = self._pool.allocate(num_total - len(hits))
        self.prefix_queries += num_tokens
        self.prefix_hits += num_cached
        reservation = self._new_reservation(spec, router_id, hashes, hits, blocks, num_copies)
        return Grant(request_id=spec.request_id, attempt=spec.attempt, grant=reservation.grant)

    def _no_capacity(self, spec: RequestSpec, reason: str, num_cached_tokens: int = 0) -> NoCapacity:
        return NoCapacity(
            request_id=spec.request_id,
            attempt=spec.attempt,
            reason=reason,
            num_free_blocks=self._pool.num_free_blocks,
            num_cached_tokens=num_cached_tokens,
        )

    def _new_reservation(
        self,
        spec: RequestSpec,
        router_id: str,
        hashes: list[bytes],
        hits: list[BlockId],
        blocks: list[BlockId],
        num_copies: int,
    ) -> Reservation:
        self._epoch += 1
        num_shipped = len(blocks) - num_copies
        grant = GrantInfo(
            grant_id=GrantId(self._worker_id, self._incarnation, self._epoch),
            spec=self._spec,
            kv_address=self._kv_address,
            block_ids=tuple(blocks[:num_shipped]),
            num_tokens=spec.num_prompt_tokens,
            num_computed_tokens=len(hits) * self._spec.block_size,
            ranks=self._regions,
            open_within_s=self._config.open_within_s,
            mac=b"",
        )
        now = self._clock.now()
        reservation = Reservation(
            spec=spec,
            router_id=router_id,
            grant=mint_grant(self._key, grant),
            block_hashes=hashes,
            hit_blocks=hits,
            block_ids=blocks[:num_shipped],
            copy_blocks=blocks[num_shipped:],
            deadline=now + self._config.open_within_s,
            since=now,
        )
        self.ledger.add(reservation)
        return reservation

    # --- the prefill worker's messages -----------------------------------------------------------------------

    def on_message(self, session: str, message: KVOpen | KVRenew | KVClosed) -> None:
        """From the connection `session`, a new name for each connection."""
        match message:
            case KVOpen():
                self._on_open(session, message)
            case KVRenew():
                self._on_renew(session, message)
            case KVClosed():
                self._on_closed(session, message)

    def _granted(self, grant_id: GrantId) -> Reservation | None:
        if (grant_id.worker_id, grant_id.incarnation) != (self._worker_id, self._incarnation):
            return None
        return self.ledger.live.get(grant_id.epoch)

    def _opened(self, grant_id: GrantId, open_id: int) -> Reservation | None:
        """The reservation whose writer speaks; counts the message where there is none."""
        reservation = self._granted(grant_id)
        if reservation is None or reservation.writer is None or reservation.writer.open_id != open_id:
            self.stale_messages += 1
            return None
        return reservation

    def _on_open(self, session: str, message: KVOpen) -> None:
        reservation = self._granted(message.grant_id)
        reason = self._refusal(session, message, reservation)
        if reason is not None:
            self.stale_messages += 1
            self._to_peer(session, KVRefused(grant_id=message.grant_id, open_id=message.open_id, reason=reason))
            return
        assert reservation is not None
        if reservation.state is ReservationState.GRANTED:
            self._bind(session, message, reservation)
        self._to_peer(
            session,
            KVOpened(
                grant_id=message.grant_id,
                open_id=message.open_id,
                lease_s=self._config.lease_s,
                generation=self._regions[0].generation,
            ),
        )

    def _refusal(self, session: str, message: KVOpen, reservation: Reservation | None) -> str | None:
        """Why the grant cannot be opened; None: now, or it is the open that is known already, told again."""
        if reservation is None:
            return "the grant has ended or was never given"
        if not is_minted(self._key, reservation.grant, message.mac):
            return "the grant's mac is wrong"
        writer = reservation.writer
        if writer is not None:
            told = (message.open_id, message.incarnation, session)
            same = told == (writer.open_id, writer.incarnation, writer.session)
            return None if same and reservation.state is ReservationState.OPEN else "the grant was opened before"
        if self.draining:
            return "draining"
        if self.quarantine_s(message.incarnation) > FENCE_AFTER_S:
            return "fenced_peer"
        return check_compatible(
            self._endpoint, Endpoint(message.spec, message.version, message.transport, message.tp_size)
        )

    def _bind(self, session: str, message: KVOpen, reservation: Reservation) -> None:
        now = self._clock.now()
        reservation.advance(ReservationState.OPEN, now)
        reservation.deadline = now + self._config.lease_s
        reservation.writer = Writer(
            message.open_id,
            session,
            message.worker_id,
            message.incarnation,
            message.tp_size,
            expected_pairs(message.tp_size, self._endpoint.tp_size, self._spec),
        )

    def _on_renew(self, session: str, message: KVRenew) -> None:
        leases: list[tuple[GrantId, int, float]] = []
        for grant_id, open_id in message.opens:
            reservation = self._opened(grant_id, open_id)
            state = reservation.state if reservation is not None else None
            if reservation is not None and state is ReservationState.OPEN:
                reservation.deadline = self._clock.now() + self._config.lease_s
            elif state is ReservationState.DOOMED:
                # Not "gone", after which a writer forgets without a word: its end is still waited for.
                self._to_peer(session, CancelKV(grant_id=grant_id, open_id=open_id))
            lasts = state in (ReservationState.OPEN, ReservationState.DOOMED)
            leases.append((grant_id, open_id, self._config.lease_s if lasts else 0.0))
        self._to_peer(session, KVRenewed(opens=tuple(leases)))

    def _on_closed(self, session: str, message: KVClosed) -> None:
        reservation = self._opened(message.grant_id, message.open_id)
        if reservation is None:
            return
        writer = reservation.writer
        if writer is None or message.source_rank >= writer.tp_size:
            self.stale_messages += 1
            return
        if reservation.state is ReservationState.OPEN:
            reason = message.reason or "the prefill worker closed the handoff"
            self._doom(reservation, reason, "ended" if message.clean else "link")
        if reservation.state is ReservationState.DOOMED:
            writer.session = session  # an end may be told over a newer connection: answer there
            if message.clean:
                self._rank_ended(reservation, message.source_rank)

    def on_session_lost(self, session: str) -> None:
        """A prefill worker's connection ended. Its word may have been lost with it, its writes may not."""
        for reservation in self.ledger.in_state(ReservationState.OPEN):
            if reservation.writer and reservation.writer.session == session:
                self._doom(reservation, f"connection to {reservation.writer.worker_id} lost", "peer")

    def on_arrived(self, decode_rank: int, message: KVArrived) -> None:
        """A source rank's notification to one of our ranks: all its writes are in our memory."""
        reservation = self._opened(message.grant_id, message.open_id)
        if reservation is None or reservation.writer is None:
            session = self.ledger.session_of_ended(message.open_id)
            if session is not None:
                self._to_peer(session, KVDone(grant_id=message.grant_id, open_id=message.open_id))
            return
        writer = reservation.writer
        pair = (message.source_rank, decode_rank)
        if pair not in writer.expected:
            self.stale_messages += 1
        elif reservation.state is ReservationState.OPEN:
            self._on_pair(reservation, writer, pair, message)
        elif reservation.state is ReservationState.DOOMED:
            self._rank_ended(reservation, message.source_rank)
        else:
            self._done(reservation)

    def _on_pair(self, reservation: Reservation, writer: Writer, pair: tuple[int, int], message: KVArrived) -> None:
        writer.ended_ranks.add(message.source_rank)
        first_choices = {choice.choice for choice in message.first_tokens}
        if message.num_tokens != reservation.num_tokens or not first_choices <= set(reservation.spec.choices):
            reason = f"{message.num_tokens} tokens of choices {sorted(first_choices)} arrived"
            self._doom(reservation, f"{reason}, want {reservation.num_tokens}", "peer")
            self._release_if_ended(reservation)
            return
        writer.arrived.add(pair)
        if message.source_rank == 0:
            reservation.first_tokens = message.first_tokens
        if writer.arrived == writer.expected:
            reservation.advance(ReservationState.ARRIVED, self._clock.now())
            self.ledger.arrived.append(reservation)
            self._handoff_done(reservation)
            self._done(reservation)

    # --- taking over, giving up ---------------------------------------------------------------------------------

    def adopt(self, reservation: Reservation) -> tuple[list[BlockId], list[BlockId]]:
        """Hand the blocks to the caller: the prompt's, in token order, and the copies. Full ones are published."""
        reservation.advance(ReservationState.ADOPTED, self._clock.now())
        self._forget(reservation, arrived=True)
        blocks = reservation.hit_blocks + reservation.block_ids
        for block, block_hash in zip(blocks, reservation.block_hashes, strict=False):  # a partial last one has none
            self._pool.publish(block, block_hash)
        return blocks, list(reservation.copy_blocks)

    def release(self, reservation: Reservation) -> None:
        """ARRIVED: the blocks go back. ADOPTED: the sequence has given them back itself."""
        if reservation.state is ReservationState.ARRIVED:
            self._forget(reservation, arrived=True)
            self._free(reservation)
        reservation.advance(ReservationState.RELEASED, self._clock.now())

    def abort(
        self, request_id: str, attempt: int, *, unless_arrived: bool = False, router_id: str | None = None
    ) -> None:
        """End the request's reservation. `unless_arrived`: keep it if it has arrived, and tell the router which."""
        reservation = self.ledger.of_request(request_id)
        if reservation is not None and reservation.spec.attempt <= attempt:
            if not unless_arrived:
                self._drop(reservation, "aborted")
            elif reservation.state is ReservationState.ARRIVED:
                self._handoff_done(reservation)
            else:
                self._drop(reservation, "aborted")
                self._fail(reservation.router_id, reservation.spec, "aborted before it arrived", "abort", reservation)
        elif unless_arrived:
            self._answer_ended(request_id, attempt, router_id)

    def _answer_ended(self, request_id: str, attempt: int, router_id: str | None) -> None:
        """What became of a handoff that is over."""
        ended = self.ledger.ended_attempt(request_id)
        router = ended.router_id if ended is not None else router_id
        if router is None:
            self.stale_messages += 1
        elif ended is not None and ended.attempt == attempt and ended.arrived:
            self._to_router(router, HandoffDone(request_id=request_id, attempt=attempt))
        else:
            blame = "unknown" if ended is None else "ended"
            self._to_router(
                router,
                HandoffFailed(request_id=request_id, attempt=attempt, reason="no such handoff", blame=blame),
            )

    def on_router_lost(self, router_id: str) -> None:
        """The router has been away for too long: nobody waits for its requests."""
        self.keep_only(router_id, frozenset())

    def keep_only(self, router_id: str, live: frozenset[tuple[str, int]]) -> None:
        """Drop the router's reservations but those of the (request id, attempt) pairs in `live`."""
        for reservation in self.ledger.of_router(router_id):
            if (reservation.spec.request_id, reservation.spec.attempt) not in live:
                self._drop(reservation, "the router no longer knows the request")

    def tick(self) -> None:
        """Act on deadlines; some ten times a second."""
        now = self._clock.now()
        for reservation in self.ledger.in_state(ReservationState.GRANTED, ReservationState.OPEN):
            if now < reservation.deadline:
                continue
            if reservation.state is ReservationState.GRANTED:
                self._drop(reservation, "expired")
                reason = f"no prefill worker opened the grant within {self._config.open_within_s} s"
                self._fail(reservation.router_id, reservation.spec, reason, "expired", None)
            else:
                self._doom(reservation, f"no renewal within {self._config.lease_s} s", "expired")

    def fence(self, incarnation: int) -> int:
        """That prefill worker can write nothing more, for certain: free what it left in quarantine. How many blocks.

        Certain is: its process is dead and it wrote through memory of this host, or the agents it wrote to are gone.
        """
        count = 0
        for reservation in self.ledger.in_state(ReservationState.OPEN, ReservationState.DOOMED):
            if reservation.writer and reservation.writer.incarnation == incarnation:
                if reservation.state is ReservationState.OPEN:
                    self._doom(reservation, f"{reservation.writer.worker_id} was fenced", "peer")
                count += len(reservation.block_ids)
                self._end_doomed(reservation)
        return count

    # --- edges ------------------------------------------------------------------------------------------------------

    def _drop(self, reservation: Reservation, reason: str) -> None:
        """Give up for a reason that its router knows."""
        if reservation.state is ReservationState.OPEN:
            self._doom(reservation, reason, None)
        elif reservation.state is ReservationState.ARRIVED:
            self.release(reservation)
        else:
            self._forget(reservation, arrived=False)
            self._free(reservation)
            reservation.advance(ReservationState.RELEASED, self._clock.now())

    def _doom(self, reservation: Reservation, reason: str, blame: str | None) -> None:
        """Stop waiting for an open. Only the blocks that the writer was told of go into quarantine."""
        writer = reservation.writer
        assert writer is not None
        reservation.advance(ReservationState.DOOMED, self._clock.now())
        self.ledger.end_attempt(reservation, arrived=False)
        self._pool.free(reservation.hit_blocks)
        self._pool.free(reservation.copy_blocks)
        self._pool.quarantine(reservation.block_ids)
        reservation.hit_blocks, reservation.copy_blocks = [], []
        self._to_peer(writer.session, CancelKV(grant_id=reservation.grant.grant_id, open_id=writer.open_id))
        if blame is not None:
            self.num_failures += 1
            self._fail(reservation.router_id, reservation.spec, reason, blame, reservation)

    def _rank_ended(self, reservation: Reservation, source_rank: int) -> None:
        """A source rank of a doomed reservation writes no more: all its posts were done, or none is left.

        One KVArrived suffices, to whichever of our ranks: a source rank sends them after all its writes were done.
        """
        assert reservation.writer is not None
        reservation.writer.ended_ranks.add(source_rank)
        self._release_if_ended(reservation)

    def _release_if_ended(self, reservation: Reservation) -> None:
        if reservation.writer is not None and reservation.writer.has_ended:
            self._end_doomed(reservation)

    def _end_doomed(self, reservation: Reservation) -> None:
        self._pool.release_quarantine(reservation.block_ids)
        self._done(reservation)
        self.ledger.remove(reservation)
        reservation.advance(ReservationState.RELEASED, self._clock.now())

    def _free(self, reservation: Reservation) -> None:
        self._pool.free(reservation.hit_blocks + reservation.block_ids + reservation.copy_blocks)

    def _forget(self, reservation: Reservation, *, arrived: bool) -> None:
        """Neither waited for nor written to any more."""
        self.ledger.end_attempt(reservation, arrived=arrived)
        self.ledger.remove(reservation)

    # --- answers ----------------------------------------------------------------------------------------------------

    def _done(self, reservation: Reservation) -> None:
        """The writer may forget the shipment."""
        writer = reservation.writer
        if writer is not None:
            self._to_peer(writer.session, KVDone(grant_id=reservation.grant.grant_id, open_id=writer.open_id))

    def _handoff_done(self, reservation: Reservation) -> None:
        num_bytes = len(reservation.block_ids) * self._spec.block_bytes()
        spec = reservation.spec
        self._to_router(
            reservation.router_id,
            HandoffDone(request_id=spec.request_id, attempt=spec.attempt, num_bytes=num_bytes),
        )

    def _fail(
        self, router_id: str, spec: RequestSpec, reason: str, blame: str, reservation: Reservation | None
    ) -> None:
        writer = reservation.writer if reservation is not None else None
        self._to_router(
            router_id,
            HandoffFailed(
                request_id=spec.request_id,
                attempt=spec.attempt,
                reason=reason[:4096],
                blame=blame,
                worker_id=writer.worker_id if writer is not None else "",
            ),
        )
