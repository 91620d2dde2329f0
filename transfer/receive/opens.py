"""The right to write: which prefill worker gets it, for how long, and who it is.

    KVOpen ─> refused: the grant is given up, or bound to its reservation ─> KVOpened
                                                                           while agents are replaced: held ─> flush
    KVRenew ─> the lease begins anew, or is gone

The first KVOpen with the grant's mac binds, for good: a grant that was opened is never opened by another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ...common.clock import Clock
from ...common.config import TransferConfig
from ...common.kv_spec import KVCacheSpec
from ...wire.fields import MAX_TEXT, Message
from ...wire.grants import GrantId, ProcessMark, RegionInfo
from ...wire.handoff import CancelKV, KVOpen, KVOpened, KVRefused, KVRenew, KVRenewed
from ..protocol.handoff import Endpoint, check_compatible, is_minted
from ..protocol.peer_log import PeerLog
from ..protocol.shards import expected_pairs, shards_of
from .endings import Counters, Endings
from .processes import ProcessWatch
from .reservation import Reservation, ReservationState, Writer
from .reservations import Reservations

FENCE_AFTER_S = 1.0  # a peer with an older quarantine opens nothing more here

WatchProcesses = Callable[[Sequence[ProcessMark]], ProcessWatch | None]


class Refusal(NamedTuple):
    """A reason why a grant cannot be opened: one of handoff.REJECTS, and the words."""

    kind: str
    reason: str


class Opens:
    """Binds writers to reservations and keeps their leases."""

    def __init__(
        self,
        *,
        reservations: Reservations,
        endings: Endings,
        spec: KVCacheSpec,
        endpoint: Endpoint,
        key: bytes,
        config: TransferConfig,
        clock: Clock,
        counters: Counters,
        watch: WatchProcesses,
        to_peer: Callable[[str, Message], None],
    ) -> None:
        self._reservations = reservations
        self._endings = endings
        self._spec = spec
        self._endpoint = endpoint
        self._key = key
        self._config = config
        self._clock = clock
        self._counters = counters
        self._watch = watch
        self._log = PeerLog("grant_not_opened")
        self._to_peer = to_peer
        self._watches: dict[int, ProcessWatch | None] = {}  # by incarnation
        self._held: dict[GrantId, tuple[str, KVOpen]] = {}  # with their sessions

    def hold(self, session: str, message: KVOpen) -> None:
        """Answer later: our agents are being replaced. The grant lasts as long as its prefill worker waits."""
        reservation = self._reservations.find(message.grant_id)
        if reservation is not None and reservation.state is ReservationState.GRANTED:
            reservation.deadline = max(reservation.deadline, self._clock.now() + self._config.lease_s)
        self._held.setdefault(message.grant_id, (session, message))

    def flush(self, regions: tuple[RegionInfo, ...], draining: bool) -> None:
        """Answer what was held."""
        held, self._held = self._held, {}
        for session, message in held.values():
            self.open(session, message, regions, draining)

    def end_held(self, grant_id: GrantId, open_id: int) -> None:
        """Answer a held open that has been closed: new agents change nothing for it, and its router waits."""
        session, message = self._held.get(grant_id, ("", None))
        if message is not None and message.open_id == open_id:
            del self._held[grant_id]
            self.open(session, message, (), draining=False)  # refused: it is among those that are over

    def drop_held(self, session: str) -> None:
        """Drop the opens of a session whose prefill worker no longer hears an answer."""
        self._held = {key: value for key, value in self._held.items() if value[0] != session}

    def open(self, session: str, message: KVOpen, regions: tuple[RegionInfo, ...], draining: bool) -> None:
        """`regions`: where writes go now, whatever the grant says."""
        reservation = self._reservations.find(message.grant_id)
        refusal = self._refusal(session, message, reservation, draining)
        if refusal is None and reservation is not None and reservation.state is ReservationState.GRANTED:
            refusal = self._bind(session, message, reservation, regions)
        if refusal is not None:
            self._counters.stale_messages += 1
            self._counters.grant_rejects[refusal.kind] += 1
            self._log.warn(message.worker_id, refusal.kind, detail=refusal.reason)
            refused = KVRefused(grant_id=message.grant_id, open_id=message.open_id, reason=refusal.reason[:MAX_TEXT])
            self._to_peer(session, refused)
            if refusal.kind != "mac" and reservation is not None and reservation.state is ReservationState.GRANTED:
                # Whom it was given to asks no second time, and the request would wait until the grant lapses.
                blame = "draining" if refusal.kind == "draining" else "refused"
                self._endings.give_up(reservation, refusal.reason, blame)
            return
        assert reservation is not None
        has_moved = reservation.grant.ranks[0].agent != regions[0].agent
        self._to_peer(
            session,
            KVOpened(
                grant_id=message.grant_id,
                open_id=message.open_id,
                lease_s=self._config.lease_s,
                generation=regions[0].generation,
                ranks=regions if has_moved else (),
            ),
        )

    def _refusal(
        self, session: str, message: KVOpen, reservation: Reservation | None, draining: bool
    ) -> Refusal | None:
        """None: it may open the grant, or it is the open that is known already, told again."""
        if reservation is None:
            return Refusal("ended", "the grant has ended or was never given")
        spec = reservation.spec
        if not is_minted(self._key, reservation.grant, spec.request_id, spec.attempt, message.mac):
            return Refusal("mac", "the grant's mac is wrong")
        if self._reservations.session_of_ended(message.open_id) is not None:
            return Refusal("ended", "the open was closed before")  # bound now, it would wait for nobody
        if reservation.writer is not None:
            return self._refuse_second(session, message, reservation, reservation.writer)
        if draining:
            return Refusal("draining", "draining")
        if self.is_fenced(message.incarnation):
            return Refusal("fenced_peer", "fenced_peer")
        if self._config.kv_checksum == "on" and not message.has_checksums:
            return Refusal("checksum", "checksums are required here (kv_checksum: on) and not made there")
        theirs = Endpoint(message.spec, message.version, message.transport, message.tp_size)
        reason = check_compatible(self._endpoint, theirs)
        return Refusal("incompatible", reason) if reason is not None else None

    def is_fenced(self, incarnation: int) -> bool:
        """Tell whether this life of a prefill worker opens nothing, as what it began here has no end yet."""
        return self._reservations.quarantine_s(self._clock.now(), incarnation) > FENCE_AFTER_S

    def _refuse_second(self, session: str, message: KVOpen, reservation: Reservation, writer: Writer) -> Refusal | None:
        told = (message.open_id, message.incarnation, session)
        is_same = told == (writer.open_id, writer.incarnation, writer.session)
        if is_same and reservation.state is ReservationState.OPEN:
            return None
        return Refusal("reused", "the grant was opened before")

    def _bind(
        self, session: str, message: KVOpen, reservation: Reservation, regions: tuple[RegionInfo, ...]
    ) -> Refusal | None:
        try:
            process_watch = self._watch_of(message)
        except ProcessLookupError as error:
            return Refusal("process", str(error))
        sources = [self._spec.shard(rank, message.tp_size) for rank in range(message.tp_size)]
        now = self._clock.now()
        reservation.advance(ReservationState.OPEN, now)
        reservation.deadline = now + self._config.lease_s
        reservation.writer = Writer(
            message.open_id,
            session,
            message.worker_id,
            message.incarnation,
            message.tp_size,
            expected_pairs(sources, shards_of(regions, self._spec)),
            opened_at=now,
            has_checksums=message.has_checksums,
            process_watch=process_watch,
        )
        return None

    def _watch_of(self, message: KVOpen) -> ProcessWatch | None:
        """One for all opens of an incarnation. Raises ProcessLookupError."""
        if message.incarnation not in self._watches:
            self._watches[message.incarnation] = self._watch(message.processes)
        return self._watches[message.incarnation]

    def close_watches(self) -> None:
        """Watch nobody who has nothing here any more."""
        needed = {found.writer.incarnation for found in self._reservations.live.values() if found.writer is not None}
        for incarnation in self._watches.keys() - needed:
            process_watch = self._watches.pop(incarnation)
            if process_watch is not None:
                process_watch.close()

    def renew(self, session: str, message: KVRenew) -> None:
        leases: list[tuple[GrantId, int, float]] = []
        for grant_id, open_id in message.opens:
            reservation = self._reservations.find(grant_id)
            state = None
            if reservation is None or reservation.writer is None or reservation.writer.open_id != open_id:
                self._counters.stale_messages += 1
            else:
                state = reservation.state
                if state is ReservationState.OPEN:
                    reservation.deadline = self._clock.now() + self._config.lease_s
                elif state is ReservationState.DOOMED:
                    # Not "gone", after which a writer forgets without a word: its end is still waited for.
                    self._to_peer(session, CancelKV(grant_id=grant_id, open_id=open_id))
            lasts = state in (ReservationState.OPEN, ReservationState.DOOMED)
            leases.append((grant_id, open_id, self._config.lease_s if lasts else 0.0))
        self._to_peer(session, KVRenewed(opens=tuple(leases)))
