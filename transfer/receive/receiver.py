"""The decode side of handoffs: reserves blocks, lets one prefill worker write them, and takes them over or gives up.

    reserve ─> GRANTED ─KVOpen─> OPEN ─KVArrived from every (source, decode) rank pair─> ARRIVED ─adopt─> ADOPTED

A grant lets a prefill worker ask, an open lets it write. An open that fails is DOOMED: its blocks stay out of use
until every source rank said that it ended cleanly, or until the writer is fenced. A lease that runs out never frees.
Parts: `grants.py` promises, `opens.py` says who may write, `arrivals.py` when all is there, `writer_ends.py` when it
will not be, `endings.py` how it ends, `rotation.py` stops silent writers, `reservations.py` keeps the books.

Pure over BlockPool and Clock: no thread, no socket, no tensor. Rank 0 decides for all ranks. The caller holds one
lock around the receiver, the pool and the scheduler.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from ...common.clock import Clock
from ...common.config import TransferConfig
from ...common.kv_spec import KVCacheSpec
from ...common.request import BlockId, RequestSpec
from ...kvcache.blocks import BlockPool
from ...kvcache.contents import Contents, TokenContents
from ...wire.fields import Message
from ...wire.grants import RegionInfo
from ...wire.handoff import KVArrived, KVClosed, KVDone, KVOpen, KVRenew
from ...wire.results import Grant, NoCapacity
from ..protocol.handoff import Endpoint, Verdict
from .arrivals import Arrivals
from .endings import Counters, Endings
from .grants import Grants
from .opens import Opens, WatchProcesses
from .processes import watch as watch_processes
from .reservation import Reservation, ReservationState
from .reservations import NOTHING_KEPT, Kept, Reservations
from .rotation import Rotation
from .writer_ends import WRITABLE, WriterEnds


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
        rotate: Callable[[int], None] | None = None,
        watch: WatchProcesses = watch_processes,
        checks_bytes: bool = False,
        contents: Contents | None = None,
    ) -> None:
        """`rotate(generation)`: begin to replace the agents of all ranks, answered by `rotated` or `rotation_failed`.

        Without it the blocks of a writer that gives no clean end stay in quarantine. `checks_bytes`: arrivals that
        carry checksums come with a verdict. `contents`: reads requests; None: by their token ids.
        """
        key = secrets.token_bytes(32)
        self._pool = pool
        self._clock = clock
        self._to_peer = to_peer
        self.reservations = Reservations(pool, worker_id, incarnation)
        self.counters = Counters()
        self.endings = Endings(
            reservations=self.reservations,
            pool=pool,
            spec=spec,
            clock=clock,
            counters=self.counters,
            to_router=to_router,
            to_peer=to_peer,
        )
        self.opens = Opens(
            reservations=self.reservations,
            endings=self.endings,
            spec=spec,
            endpoint=Endpoint(spec, version, transport, tp_size),
            key=key,
            config=config,
            clock=clock,
            counters=self.counters,
            watch=watch,
            to_peer=to_peer,
        )
        self.rotation = Rotation(
            reservations=self.reservations,
            endings=self.endings,
            clock=clock,
            num_blocks=pool.num_blocks,
            regions=regions,
            rotate=rotate,
        )
        self._grants = Grants(
            worker_id=worker_id,
            incarnation=incarnation,
            spec=spec,
            pool=pool,
            reservations=self.reservations,
            endings=self.endings,
            rotation=self.rotation,
            counters=self.counters,
            kv_address=kv_address,
            key=key,
            config=config,
            clock=clock,
            contents=contents if contents is not None else TokenContents(spec),
        )
        self._arrivals = Arrivals(
            reservations=self.reservations,
            endings=self.endings,
            clock=clock,
            counters=self.counters,
            checks_bytes=checks_bytes,
        )
        self._writer_ends = WriterEnds(
            reservations=self.reservations,
            endings=self.endings,
            opens=self.opens,
            clock=clock,
            counters=self.counters,
            config=config,
            to_peer=to_peer,
        )
        self.draining = False  # grants and opens nothing more
        self.is_active = True  # False: grants nothing more; what was granted is opened, arrives and is adopted

    # --- what it holds, and promises ------------------------------------------------------------------------------

    @property
    def arrived(self) -> list[Reservation]:
        """Return the reservations that wait for room in the batch, in the order of arrival."""
        return self.reservations.arrived

    @property
    def has_open(self) -> bool:
        """Somebody may write or report an end: notifications must be polled."""
        return bool(self.reservations.in_state(*WRITABLE))

    def holds(self, request_id: str) -> bool:
        """There is a reservation of the request that may still be adopted."""
        return self.reservations.of_request(request_id) is not None

    @property
    def num_live(self) -> int:
        return len(self.reservations.live)

    def quarantine_s(self, incarnation: int | None = None) -> float:
        """Age of the oldest quarantine (of one prefill worker's incarnation); 0 where there is none."""
        return self.reservations.quarantine_s(self._clock.now(), incarnation)

    def check(self) -> None:
        """Assert that the reservations' books and the pool's agree."""
        self.reservations.check()

    def reserve(
        self,
        spec: RequestSpec,
        router_id: str,
        *,
        max_local_tokens: int = 0,
        growth_reserve: int = 0,
        kept: Kept = NOTHING_KEPT,
        retains_prefix: bool = True,
        hashes: Callable[[], list[bytes]] | None = None,
    ) -> Grant | NoCapacity:
        """Reserve blocks for a prompt and for the copies that its choices need; a lower attempt of the request ends.

        `growth_reserve` blocks stay free, and what is `kept` for others. "held": what is missing is so little (at
        most `max_local_tokens`) that it should be computed here. `retains_prefix`: the prompt is cached here alone.
        `hashes`: of the prompt's full blocks, where somebody keeps them; None: they are computed.
        """
        answer = self._grants.reserve(
            spec,
            router_id,
            max_local_tokens=max_local_tokens,
            growth_reserve=growth_reserve,
            kept=kept,
            hashes=hashes,
            refusal="draining" if self.draining else "" if self.is_active else "wrong_role",
        )
        if isinstance(answer, Grant) and (found := self.reservations.of_request(spec.request_id)) is not None:
            found.retains_prefix = retains_prefix
        return answer

    # --- the prefill worker's messages -----------------------------------------------------------------------

    def on_message(self, session: str, message: KVOpen | KVRenew | KVClosed) -> None:
        """Take a message from the connection `session`, a new name for each connection."""
        match message:
            case KVOpen():
                if self.opens.is_fenced(message.incarnation):
                    self.rotation.hurry()
                if self.rotation.timer.is_idle:
                    self.opens.open(session, message, self.rotation.regions, self.draining)
                else:
                    self.opens.hold(session, message)
            case KVRenew():
                self.opens.renew(session, message)
            case KVClosed():
                self._writer_ends.on_closed(session, message)
        self._step_rotation()

    def on_session_lost(self, session: str) -> None:
        """A prefill worker's connection ended. Its word may have been lost with it, its writes may not."""
        self._writer_ends.on_session_lost(session)

    def on_arrived(self, decode_rank: int, message: KVArrived, verdict: Verdict = Verdict.UNCHECKED) -> None:
        """A source rank's notification to one of our ranks: all its writes are in our memory."""
        reservation = self.reservations.of_open(message.grant_id, message.open_id)
        if reservation is None:
            self.counters.stale_messages += 1
            if (session := self.reservations.session_of_ended(message.open_id)) is not None:
                self._to_peer(session, KVDone(grant_id=message.grant_id, open_id=message.open_id))
            return
        self._arrivals.on_arrived(reservation, decode_rank, message, verdict)
        self._step_rotation()

    # --- taking over, giving up ---------------------------------------------------------------------------------

    def adopt(self, reservation: Reservation) -> tuple[list[BlockId], list[BlockId]]:
        """Hand the blocks to the caller: the prompt's, in token order, and the copies. Full ones are published."""
        reservation.advance(ReservationState.ADOPTED, self._clock.now())
        self.endings.forget(reservation, arrived=True)
        blocks = reservation.hit_blocks + reservation.block_ids
        for block, name in zip(blocks, reservation.names(), strict=False):  # a partial last one has none
            self._pool.publish(block, name, spare=not reservation.retains_prefix)
        if reservation.retains_prefix:
            self._pool.keep(reservation.hit_blocks)
        return blocks, list(reservation.copy_blocks)

    def release(self, reservation: Reservation) -> None:
        """ARRIVED: the blocks go back. ADOPTED: the sequence has given them back itself."""
        self.endings.release(reservation)

    def abort(
        self, request_id: str, attempt: int, *, unless_arrived: bool = False, router_id: str | None = None
    ) -> None:
        """End the request's reservation. `unless_arrived`: keep it if it has arrived, and tell the router which."""
        reservation = self.reservations.of_request(request_id)
        if reservation is not None and reservation.spec.attempt <= attempt:
            if unless_arrived and reservation.state is ReservationState.ARRIVED:
                self.endings.tell_arrived(reservation)
                return
            self.endings.drop(reservation, "aborted")
            if unless_arrived:
                reason = "aborted before it arrived"
                self.endings.tell_failed(reservation.router_id, reservation.spec, reason, "abort", reservation)
        elif unless_arrived:
            self.endings.tell_what_became(request_id, attempt, router_id)

    def on_router_lost(self, router_id: str) -> None:
        """The router has been away for too long: nobody waits for its requests."""
        self.keep_only(router_id, frozenset())

    def keep_only(self, router_id: str, live: frozenset[tuple[str, int]]) -> None:
        """Drop the router's reservations but those of the (request id, attempt) pairs in `live`."""
        for reservation in self.reservations.of_router(router_id):
            if (reservation.spec.request_id, reservation.spec.attempt) not in live:
                self.endings.drop(reservation, "the router no longer knows the request")

    # --- time and fences ------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Act on deadlines and on writers' ends; some ten times a second."""
        self._writer_ends.check()
        self.opens.close_watches()
        self.rotation.step()
        self._answer_held()

    def _step_rotation(self) -> None:
        """A fence that waits may have nothing to wait for any more."""
        if not self.rotation.timer.is_idle:
            self.rotation.step()
            self._answer_held()

    def _answer_held(self) -> None:
        if self.rotation.timer.is_idle:
            self.opens.flush(self.rotation.regions, self.draining)

    def rotated(self, regions: tuple[RegionInfo, ...]) -> int:
        """Every rank has the agent that `rotate` asked for: what only the old ones could reach is free. Blocks."""
        count = self.rotation.rotated(regions)
        self._answer_held()
        return count

    def rotation_failed(self) -> None:
        """Some rank could not make a new agent. `rotate` is called again after a while."""
        self.rotation.failed()
