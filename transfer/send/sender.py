"""The prefill side of handoffs: one KVSender per source rank, driven by the transfer thread alone.

    open ─KVOpened─> pages_ready (layer by layer) ─> post ─> poll ─> finish ─> KVArrived ─KVDone─> over

Nothing is posted before the decode worker's KVOpened, nothing from the lease's end on: the clock is read right
before each post. The lease counts from *sending* the message that it answers, so we end before the decode worker
does, whatever the delay. A page is posted once per open. The shipment's states are drawn in `shipment.py`.

Rank 0 speaks for the handoff (KVOpen, KVRenew); the other ranks get the same calls and the same answers relayed.

Between the look at the clock and the post we may be stopped for any time, so a lease keeps order and no more. What
then protects the decode worker's blocks is told in `rotation.py`: a post names an agent, which is gone if we were taken
for lost, and a copy that we make ourselves is waited for until we say that it ended, or have ended with it.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from ...common.clock import Clock
from ...common.config import TransferConfig
from ...common.errors import TransferError
from ...common.kv_spec import KVCacheSpec
from ...wire.fields import Count, Message
from ...wire.grants import GrantInfo, ProcessMark
from ...wire.handoff import CancelKV, KVDone, KVOpen, KVOpened, KVRefused, KVRenewed
from ...wire.results import ChoiceList
from ...wire.workers import TransferReport
from ..backends.base import Indices, TransferBackend, TransferState
from ..backends.peers import Peers
from ..fetch.reader import KVReader, Tell
from ..protocol.checksums import PageSums
from ..protocol.handoff import Endpoint, open_mac, page_indices
from ..protocol.peer_log import PeerLog
from .closings import Closings
from .counters import SendCounters
from .leases import Renewals
from .posting import Posting
from .shipment import Shipment, ShipmentState, Target
from .writes import Write, Writes

# Of a lease that is used. The rest pays for clocks that run up to a thousandth apart and for the time between the
# look at the clock and the post.
USABLE_LEASE_SHARE = 0.95
MAX_IN_FLIGHT_BYTES = 64 << 20  # per decode worker: one that hangs must not hold the others' writes
MAX_WRITE_BYTES = 8 << 20  # over shared memory a post is the copy: the clock is looked at between two
_ORPHAN_POLL_S = 0.1

log = structlog.get_logger(__name__)


class KVSender:
    """Owner of one rank's shipments."""

    def __init__(
        self,
        *,
        rank: int,
        tp_size: int,
        worker_id: str,
        incarnation: int,
        version: str,
        backend: TransferBackend,
        spec: KVCacheSpec,
        num_blocks: int,
        clock: Clock,
        config: TransferConfig,
        to_peer: Callable[[str, Message], None],
        report: Callable[[TransferReport], None],
        source_free: Callable[[int], None],
        on_read: Tell | None = None,
        sums: PageSums | None = None,
        processes: tuple[ProcessMark, ...] = (),
        max_in_flight_bytes: int = MAX_IN_FLIGHT_BYTES,
        max_write_bytes: int = MAX_WRITE_BYTES,
    ) -> None:
        """`num_blocks`: of our own pages. `source_free(open_id)`: the shipment reads its source blocks no more.

        `on_read`: hears of the reads of `reader`, which share our agent and our turns; None: there are none.
        `sums`: over our pages, where checksums are made. `processes`: of all source ranks, where they may copy into
        other processes' memory by themselves.
        """
        self._rank = rank
        self._tp_size = tp_size
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._version = version
        self._backend = backend
        self._spec = spec
        self._has_checksums = sums is not None
        self._processes = processes
        self._num_blocks = num_blocks
        self._clock = clock
        self._config = config
        self._to_peer = to_peer
        self._report = report
        self._source_free = source_free
        self._shipments: dict[int, Shipment] = {}  # by open id, all but ENDED
        self.peers = Peers(backend)
        self.reader: KVReader | None = None
        if on_read is not None:
            self.reader = KVReader(
                rank=rank,
                backend=backend,
                spec=spec,
                tp_size=tp_size,
                num_blocks=num_blocks,
                clock=clock,
                peers=self.peers,
                tell=on_read,
                sums=sums,
            )
        self._writes = Writes(backend, self.peers, max_in_flight_bytes)
        self._posting = Posting(
            backend,
            self._writes,
            Endpoint(spec, version, backend.name, tp_size),
            rank=rank,
            sums=sums,
            max_write_bytes=max_write_bytes,
        )
        self._renewals = Renewals(config.renew_every_s, to_peer)
        self._closings = Closings(rank, to_peer, copies_itself=bool(processes))
        self.num_bytes = 0  # written since start
        self.num_failures = 0  # shipments that ended with "may still land"
        self.made_progress = False  # a write ended in the last step: the next need not wait
        self._log = PeerLog("shipment_failed")

    @property
    def num_unfinished(self) -> int:
        return len(self._shipments)

    def counters(self) -> SendCounters:
        return SendCounters(self.num_unfinished, self.num_bytes, self.num_failures, self._backend.telemetry_bytes)

    # --- the prefill role's calls ---------------------------------------------------------------------------

    def open(self, open_id: int, request_id: str, attempt: int, grant: GrantInfo) -> None:
        """Ask for the right to write. `open_id`: 64 random bits, new for each shipment, the same on all ranks."""
        assert open_id not in self._shipments, open_id
        now = self._clock.now()
        deadline = now + USABLE_LEASE_SHARE * self._config.lease_s
        shipment = Shipment(open_id, request_id, attempt, grant, self._posting.targets(grant), now, deadline, now)
        self._shipments[open_id] = shipment
        self._renewals.add(shipment, now)
        if self._rank == 0:
            self._send_open(shipment)
        # Its agent is connected to when it has answered: over a dead link that would hold up everybody for minutes.

    def _send_open(self, shipment: Shipment) -> None:
        grant = shipment.grant
        self._to_peer(
            grant.kv_address,
            KVOpen(
                grant_id=grant.grant_id,
                open_id=shipment.open_id,
                mac=open_mac(grant, shipment.request_id, shipment.attempt),
                worker_id=self._worker_id,
                incarnation=self._incarnation,
                spec=self._spec,
                version=self._version,
                transport=self._backend.name,
                tp_size=self._tp_size,
                processes=self._processes,
                has_checksums=self._has_checksums,
            ),
        )

    def pages_ready(self, open_id: int, layer: int, local_blocks: Indices, remote_blocks: Indices) -> None:
        """Take blocks that are complete in this layer and will not change. In the order of our blocks, runs merge."""
        shipment = self._shipments.get(open_id)
        if shipment is not None and shipment.is_live:
            local = page_indices(layer, local_blocks, self._num_blocks)
            remote = page_indices(layer, remote_blocks, shipment.remote_num_blocks)
            shipment.add_pages(local, remote)

    def layers_done(self, open_id: int) -> None:
        """The prompt's last layer is computed: what is written from now on is exposed."""
        shipment = self._shipments.get(open_id)
        if shipment is not None:
            shipment.computed_at = self._clock.now()

    def finish(self, open_id: int, first_tokens: ChoiceList, num_cached_tokens: Count = 0) -> None:
        """Every page was given and the first tokens are known (none when resuming)."""
        shipment = self._shipments.get(open_id)
        if shipment is None or not shipment.is_live:
            return
        num_pages, expected = len(shipment.remote_pages), shipment.num_expected_pages
        assert num_pages == expected, f"{num_pages} pages of {expected} were given"
        shipment.finished, shipment.first_tokens = True, first_tokens
        shipment.num_cached_tokens = num_cached_tokens

    def cancel(self, open_id: int, reason: str) -> None:
        """Ship nothing more. Idempotent; a shipment that has told its arrival is not taken back."""
        shipment = self._shipments.get(open_id)
        if shipment is not None:
            self._stop(shipment, reason)

    # --- the decode worker's answers ------------------------------------------------------------------------

    def on_message(self, message: KVOpened | KVRefused | KVRenewed | CancelKV | KVDone) -> None:
        if isinstance(message, KVRenewed):
            self._on_renewed(message)
            return
        if isinstance(message, KVDone):
            self._closings.acked(message.open_id)
        shipment = self._shipments.get(message.open_id)
        if shipment is None or shipment.grant.grant_id != message.grant_id:
            return  # it ended: nobody waits for an answer
        match message:
            case KVOpened():
                self._on_opened(shipment, message)
            case KVRefused(reason=reason):
                if shipment.state is ShipmentState.OPENING:
                    self._end(shipment, clean=True, reason=f"refused: {reason}")
            case CancelKV():
                if shipment.state is ShipmentState.TOLD:
                    self._tell(shipment)
                    # It was given up over there before it arrived, perhaps with the agent that would hear of it.
                    self._closings.add(shipment, self._clock.now(), "everything was written", clean=True)
                self._stop(shipment, "cancelled by the decode worker")
            case KVDone():
                if shipment.state is ShipmentState.TOLD:
                    self._end(shipment, clean=True, is_known=True)
                self._stop(shipment, "the decode worker needs nothing more")

    def _on_opened(self, shipment: Shipment, message: KVOpened) -> None:
        if shipment.state is not ShipmentState.OPENING:
            return
        now = self._clock.now()
        shipment.deadline = shipment.answered_at + USABLE_LEASE_SHARE * message.lease_s
        shipment.answered_at = now
        reason = self._posting.move(shipment, message)
        if reason is None:
            try:
                self._posting.connect(shipment)
            except TransferError as error:
                reason = str(error)
        if reason is None and now >= shipment.deadline:
            reason = "KVOpened came after its lease"
        if reason is None:
            shipment.advance(ShipmentState.SHIPPING, now)
        else:
            self._end(shipment, clean=True, reason=reason)

    def _on_renewed(self, message: KVRenewed) -> None:
        now = self._clock.now()
        for grant_id, open_id, lease_s in message.opens:
            shipment = self._shipments.get(open_id)
            if shipment is None or shipment.grant.grant_id != grant_id:
                continue
            if lease_s <= 0:
                if shipment.state is ShipmentState.TOLD:
                    self._end(shipment, clean=True, is_known=True)
                self._stop(shipment, "the decode worker no longer knows the handoff")
            elif (asked_at := self._asked_at(shipment)) is not None:
                shipment.deadline = max(shipment.deadline, asked_at + USABLE_LEASE_SHARE * lease_s)
                shipment.answered_at = now
        for peer in {(grant_id.worker_id, grant_id.incarnation) for grant_id, _, _ in message.opens}:
            self._renewals.answered(peer)

    def _asked_at(self, shipment: Shipment) -> float | None:
        """A time not after the KVRenew was sent that is answered now.

        Only rank 0 knows it. For the others the answer before is safe: rank 0 asks again only after an answer.
        """
        return self._renewals.asked_at(shipment.peer) if self._rank == 0 else shipment.answered_at

    def on_peer_lost(self, kv_address: str) -> None:
        """The control connection to a decode worker ended: its cancels no longer reach us."""
        self._renewals.peer_lost(kv_address)
        for shipment in list(self._shipments.values()):
            if shipment.grant.kv_address == kv_address:
                self._stop(shipment, "connection to the decode worker lost")
        self._writes.peer_lost(kv_address)

    # --- the transfer thread's turn -----------------------------------------------------------------------------

    def step(self) -> float | None:
        """Post, poll, tell, renew. Seconds until the next call is wanted; None: only after another call."""
        now = self._clock.now()
        is_held = self._closings.wants_new_agent(now) or (self.reader is not None and self.reader.wants_new_agent(now))
        for shipment in list(self._shipments.values()):
            self._check_deadline(shipment, now)
            if not is_held:
                self._post(shipment)
        self._poll()
        for shipment in list(self._shipments.values()):
            self._settle(shipment)
        self._writes.forget_lost(self._shipments.values())
        if is_held and not any(shipment.num_writes for shipment in self._shipments.values()):
            self._replace_agent()
        self._closings.repeat(now, self._config.renew_every_s)
        if self._rank == 0:
            self._renewals.renew(self._shipments.values(), now)
        return _sooner(self._next_call_s(), self._step_reader())

    def _step_reader(self) -> float | None:
        if self.reader is None:
            return None
        wait_s = self.reader.step()
        self.made_progress |= self.reader.made_progress
        return wait_s

    def _check_deadline(self, shipment: Shipment, now: float) -> None:
        if now >= shipment.deadline:
            if shipment.state is ShipmentState.TOLD:
                self._end(shipment, clean=True, reason="everything was written")
            self._stop(shipment, "lease over")

    def _post(self, shipment: Shipment) -> None:
        for target in shipment.targets:
            while shipment.state is ShipmentState.SHIPPING and target.num_posted < len(shipment.local_pages):
                if not self._post_next(shipment, target):
                    return

    def _post_next(self, shipment: Shipment, target: Target) -> bool:
        """One write. False: not now, the peer has too much in flight or the lease is over."""
        end = self._posting.next_piece(shipment, target)
        now = self._clock.now()
        if end is None or now >= shipment.deadline:
            return False
        try:
            self._posting.post(shipment, target, end, now)
        except TransferError as error:
            self._fail(shipment, str(error), has_failed=True)
            return False
        if shipment.first_post_at is None:
            shipment.first_post_at = now
        return True

    def _poll(self) -> None:
        now = self._clock.now()
        self.made_progress = False
        for write, state in self._writes.poll():
            if state is TransferState.PENDING:
                self._check_write(write, now)
                continue
            self.made_progress = True
            if write.shipment.state is ShipmentState.ENDED:
                self._closings.write_ended(write.shipment.open_id, state, now)
            elif state is TransferState.FAILED:
                self._fail(write.shipment, "a write failed", has_failed=True)
            else:
                write.shipment.num_bytes += write.handle.num_bytes
                write.shipment.last_done_at = now
                self.num_bytes += write.handle.num_bytes

    def _check_write(self, write: Write, now: float) -> None:
        if write.shipment.state is ShipmentState.SHIPPING and now - write.posted_at > self._config.write_timeout_s:
            self._fail(write.shipment, f"a write is not done after {self._config.write_timeout_s} s")

    def _settle(self, shipment: Shipment) -> None:
        """Tell the arrival, again and again, or the end."""
        now = self._clock.now()
        if shipment.state is ShipmentState.SHIPPING:
            if shipment.finished and shipment.is_posted and not shipment.num_writes and now < shipment.deadline:
                shipment.advance(ShipmentState.TOLD, now)
                self._source_free(shipment.open_id)
                self._tell(shipment)
        elif shipment.state is ShipmentState.TOLD:
            if now - shipment.announced_at >= self._config.renew_every_s:
                self._tell(shipment)
        elif shipment.state is ShipmentState.CLOSING:
            if not shipment.num_writes:
                self._end(shipment, clean=True)
            elif now - shipment.since > self._config.write_timeout_s:
                self._fail(shipment, f"{shipment.reason}; a write is not done")

    def _tell(self, shipment: Shipment) -> None:
        shipment.announced_at = self._clock.now()
        self._posting.tell(shipment)

    def _replace_agent(self) -> None:
        """Replace our agent: what it may still do ends with it. Nothing of a shipment's is under way."""
        now = self._clock.now()
        try:
            self._posting.replace_agent()
        except TransferError as error:
            self._closings.try_later(now)
            log.warning("transfer_agent_not_replaced", rank=self._rank, reason=str(error))
            return
        finally:
            if self.reader is not None:
                self.reader.agent_replaced(now)
        self._closings.detached(now)
        for shipment in list(self._shipments.values()):
            try:
                self._posting.connect(shipment)
            except TransferError as error:
                self._stop(shipment, str(error))

    def _next_call_s(self) -> float | None:
        shipments = self._shipments.values()
        if any(shipment.num_writes or shipment.wants_turn for shipment in shipments):
            return 0.0
        now = self._clock.now()
        times = [shipment.deadline for shipment in shipments]
        if self._rank == 0:
            times += self._renewals.next_times()
        if self._writes:
            times.append(now + _ORPHAN_POLL_S)
        if (at := self._closings.next_call_at(self._config.renew_every_s)) is not None:
            times.append(at)
        return max(0.0, min(times) - now) if times else None

    # --- ends ---------------------------------------------------------------------------------------------------

    def _stop(self, shipment: Shipment, reason: str) -> None:
        """Post nothing more. Without an open nothing was posted; else what was posted has to end first."""
        if shipment.state is ShipmentState.OPENING:
            self._end(shipment, clean=True, reason=reason)
        elif shipment.state is ShipmentState.SHIPPING:
            shipment.advance(ShipmentState.CLOSING, self._clock.now())
            shipment.reason = reason
            self._source_free(shipment.open_id)

    def _fail(self, shipment: Shipment, reason: str, *, has_failed: bool = False) -> None:
        """End a shipment whose posts may still land. `has_failed`: nobody will tell when they no longer can."""
        if shipment.state in (ShipmentState.SHIPPING, ShipmentState.CLOSING):
            self.num_failures += 1
            kind = "write failed" if has_failed else "write timed out"
            self._log.warn(shipment.peer[0], kind, detail=reason, request_id=shipment.request_id)
            self._end(shipment, clean=False, reason=reason, has_failed=has_failed)

    def _end(
        self, shipment: Shipment, *, clean: bool, reason: str = "", has_failed: bool = False, is_known: bool = False
    ) -> None:
        """`is_known`: the decode worker has said so, and waits for no word of ours."""
        now, was_live = self._clock.now(), shipment.is_live
        if not is_known:
            self._closings.add(shipment, now, reason or shipment.reason, clean=clean, has_failed=has_failed)
        self._writes.disown(shipment)
        shipment.advance(ShipmentState.ENDED, now)
        del self._shipments[shipment.open_id]
        if not any(other.peer == shipment.peer for other in self._shipments.values()):
            self._renewals.remove(shipment.peer)
        if was_live:
            self._source_free(shipment.open_id)
        if self._rank == 0:
            self._report(shipment.report(clean))


def _sooner(one: float | None, other: float | None) -> float | None:
    return min((time for time in (one, other) if time is not None), default=None)
