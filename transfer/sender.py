"""The prefill side of handoffs: one KVSender per source rank, driven by the transfer thread alone.

    open ─KVOpened─> pages_ready (layer by layer) ─> post ─> poll ─> finish ─> KVArrived ─KVDone─> over

Nothing is posted before the decode worker's KVOpened, nothing from the lease's end on: the clock is read right
before each post. The lease counts from *sending* the message that it answers, so we end before the decode worker
does, whatever the delay. A page is posted once per open. The shipment's states are drawn in `shipment.py`.

Rank 0 speaks for the handoff (KVOpen, KVRenew); the other ranks get the same calls and the same answers relayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..common.blocks import KVCacheSpec
from ..common.clock import Clock
from ..common.config import TransferConfig
from ..common.errors import TransferError
from ..common.messages import (
    CancelKV,
    ChoiceTokens,
    GrantInfo,
    KVArrived,
    KVClosed,
    KVDone,
    KVOpen,
    KVOpened,
    KVRefused,
    KVRenew,
    KVRenewed,
    Message,
    TransferReport,
    encode,
)
from .base import Indices, TransferBackend, TransferState
from .handoff import page_indices, targets_of
from .shipment import Shipment, ShipmentState, Target
from .writes import Write, Writes

# Of a lease that is used. The rest pays for clocks that run up to a thousandth apart and for the time between the
# look at the clock and the post.
USABLE_LEASE_SHARE = 0.95
MAX_IN_FLIGHT_BYTES = 64 << 20  # per decode worker: one that hangs must not hold the others' writes
MAX_WRITE_BYTES = 8 << 20  # over shared memory a post is the copy: the clock is looked at between two
_ORPHAN_POLL_S = 0.1


@dataclass(slots=True, eq=False)
class _Peer:
    """A decode worker with shipments."""

    kv_address: str
    renew_at: float
    renew_sent_at: float | None = None  # of the KVRenew that waits for its answer


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
        max_in_flight_bytes: int = MAX_IN_FLIGHT_BYTES,
        max_write_bytes: int = MAX_WRITE_BYTES,
    ) -> None:
        """`num_blocks`: of our own pages. `source_free(open_id)`: the shipment reads its source blocks no more."""
        self._rank = rank
        self._tp_size = tp_size
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._version = version
        self._backend = backend
        self._spec = spec
        self._num_blocks = num_blocks
        self._clock = clock
        self._config = config
        self._to_peer = to_peer
        self._report = report
        self._source_free = source_free
        self._max_write_bytes = max_write_bytes
        self._shipments: dict[int, Shipment] = {}  # by open id, all but ENDED
        self._writes = Writes(backend, max_in_flight_bytes)
        self._peers: dict[tuple[str, int], _Peer] = {}  # by worker id and incarnation
        self.num_bytes = 0  # written since start
        self.num_failures = 0  # shipments that ended with "may still land"
        self.made_progress = False  # a write ended in the last step: the next need not wait

    @property
    def num_unfinished(self) -> int:
        return len(self._shipments)

    # --- the prefill role's calls ---------------------------------------------------------------------------

    def open(self, open_id: int, request_id: str, attempt: int, grant: GrantInfo) -> None:
        """Ask for the right to write. `open_id`: 64 random bits, new for each shipment, the same on all ranks."""
        assert open_id not in self._shipments, open_id
        now = self._clock.now()
        targets = [Target(region, runs) for region, runs in targets_of(self._rank, self._tp_size, grant)]
        deadline = now + USABLE_LEASE_SHARE * self._config.lease_s
        shipment = Shipment(open_id, request_id, attempt, grant, targets, now, deadline, now)
        self._shipments[open_id] = shipment
        self._peers.setdefault(shipment.peer, _Peer(grant.kv_address, renew_at=now + self._config.renew_every_s))
        if self._rank == 0:
            self._send_open(shipment)
        try:
            for target in targets:
                self._writes.connect(grant.kv_address, target)
        except TransferError as error:
            self._end(shipment, clean=True, reason=str(error))

    def _send_open(self, shipment: Shipment) -> None:
        grant = shipment.grant
        self._to_peer(
            grant.kv_address,
            KVOpen(
                grant_id=grant.grant_id,
                open_id=shipment.open_id,
                mac=grant.mac,
                worker_id=self._worker_id,
                incarnation=self._incarnation,
                spec=self._spec,
                version=self._version,
                transport=self._backend.name,
                tp_size=self._tp_size,
            ),
        )

    def pages_ready(self, open_id: int, layer: int, local_blocks: Indices, remote_blocks: Indices) -> None:
        """These blocks are complete in this layer and will not change. In the order of our blocks, runs merge."""
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

    def finish(self, open_id: int, first_tokens: tuple[ChoiceTokens, ...]) -> None:
        """Every page was given and the first tokens are known (none when resuming)."""
        shipment = self._shipments.get(open_id)
        if shipment is None or not shipment.is_live:
            return
        num_pages, expected = len(shipment.remote_pages), shipment.num_expected_pages
        assert num_pages == expected, f"{num_pages} pages of {expected} were given"
        shipment.finished, shipment.first_tokens = True, first_tokens

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
                self._stop(shipment, "cancelled by the decode worker")
            case KVDone():
                if shipment.state is ShipmentState.TOLD:
                    self._end(shipment, clean=True)
                self._stop(shipment, "the decode worker needs nothing more")

    def _on_opened(self, shipment: Shipment, message: KVOpened) -> None:
        if shipment.state is not ShipmentState.OPENING:
            return
        now = self._clock.now()
        shipment.deadline = shipment.answered_at + USABLE_LEASE_SHARE * message.lease_s
        shipment.answered_at = now
        if message.generation != shipment.grant.ranks[0].generation:
            self._end(shipment, clean=True, reason=f"the decode worker's agents are generation {message.generation}")
        elif now >= shipment.deadline:
            self._end(shipment, clean=True, reason="KVOpened came after its lease")
        else:
            shipment.advance(ShipmentState.SHIPPING, now)

    def _on_renewed(self, message: KVRenewed) -> None:
        now = self._clock.now()
        for grant_id, open_id, lease_s in message.opens:
            shipment = self._shipments.get(open_id)
            if shipment is None or shipment.grant.grant_id != grant_id:
                continue
            if lease_s <= 0:
                if shipment.state is ShipmentState.TOLD:
                    self._end(shipment, clean=True)
                self._stop(shipment, "the decode worker no longer knows the handoff")
            elif (asked_at := self._asked_at(shipment)) is not None:
                shipment.deadline = max(shipment.deadline, asked_at + USABLE_LEASE_SHARE * lease_s)
                shipment.answered_at = now
        for key in {(grant_id.worker_id, grant_id.incarnation) for grant_id, _, _ in message.opens}:
            if (peer := self._peers.get(key)) is not None:
                peer.renew_sent_at = None

    def _asked_at(self, shipment: Shipment) -> float | None:
        """A time not after the KVRenew was sent that is answered now.

        Only rank 0 knows it. For the others the answer before is safe: rank 0 asks again only after an answer.
        """
        return self._peers[shipment.peer].renew_sent_at if self._rank == 0 else shipment.answered_at

    def on_peer_lost(self, kv_address: str) -> None:
        """The control connection to a decode worker ended: its cancels no longer reach us."""
        for peer in self._peers.values():
            if peer.kv_address == kv_address:
                peer.renew_sent_at = None
        for shipment in list(self._shipments.values()):
            if shipment.grant.kv_address == kv_address:
                self._stop(shipment, "connection to the decode worker lost")
        self._writes.peer_lost(kv_address)

    # --- the transfer thread's turn -----------------------------------------------------------------------------

    def step(self) -> float | None:
        """Post, poll, tell, renew. Seconds until the next call is wanted; None: only after another call."""
        now = self._clock.now()
        for shipment in list(self._shipments.values()):
            self._check_deadline(shipment, now)
            self._post(shipment)
        self._poll()
        for shipment in list(self._shipments.values()):
            self._settle(shipment)
        self._writes.forget_lost(self._shipments.values())
        if self._rank == 0:
            self._renew(now)
        return self._next_call_s()

    def _check_deadline(self, shipment: Shipment, now: float) -> None:
        if now >= shipment.deadline:
            if shipment.state is ShipmentState.TOLD:
                self._end(shipment, clean=True)
            self._stop(shipment, "lease over")

    def _post(self, shipment: Shipment) -> None:
        for target in shipment.targets:
            while shipment.state is ShipmentState.SHIPPING and target.num_posted < len(shipment.local_pages):
                if not self._post_next(shipment, target):
                    return

    def _post_next(self, shipment: Shipment, target: Target) -> bool:
        """One write. False: not now, the peer has too much in flight or the lease is over."""
        start = target.num_posted
        end = min(len(shipment.local_pages), start + max(1, self._max_write_bytes // target.page_bytes))
        if not self._writes.has_room(shipment.peer, (end - start) * target.page_bytes):
            return False
        local, remote = shipment.local_pages[start:end], shipment.remote_pages[start:end]
        now = self._clock.now()
        if now >= shipment.deadline:
            return False
        target.num_posted = end
        try:
            self._writes.post(shipment, target, local, remote, now)
        except TransferError as error:
            self._fail(shipment, str(error))
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
                continue
            if state is TransferState.FAILED:
                self._fail(write.shipment, "a write failed")
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
            if now - shipment.told_at >= self._config.renew_every_s:
                self._tell(shipment)
        elif shipment.state is ShipmentState.CLOSING:
            if not shipment.num_writes:
                self._end(shipment, clean=True)
            elif now - shipment.since > self._config.write_timeout_s:
                self._fail(shipment, f"{shipment.reason}; a write is not done")

    def _tell(self, shipment: Shipment) -> None:
        """KVArrived to every decode rank that this rank wrote to."""
        shipment.told_at = self._clock.now()
        payload = encode(
            KVArrived(
                grant_id=shipment.grant.grant_id,
                open_id=shipment.open_id,
                source_rank=self._rank,
                num_tokens=shipment.grant.num_tokens,
                first_tokens=shipment.first_tokens if self._rank == 0 else (),
            )
        )
        for target in shipment.targets:
            try:
                self._backend.notify(target.region.agent, payload)
            except TransferError:
                pass  # told again until the lease is over; a decode worker that lives lets it run out as well

    def _renew(self, now: float) -> None:
        """One KVRenew per decode worker for all of its shipments. The next waits for this one's answer."""
        for key, peer in self._peers.items():
            if now < peer.renew_at or peer.renew_sent_at is not None:
                continue
            peer.renew_at = now + self._config.renew_every_s
            opens = tuple(
                (shipment.grant.grant_id, shipment.open_id)
                for shipment in self._shipments.values()
                if shipment.peer == key and shipment.state in (ShipmentState.SHIPPING, ShipmentState.TOLD)
            )
            if opens:
                peer.renew_sent_at = now
                self._to_peer(peer.kv_address, KVRenew(opens=opens))

    def _next_call_s(self) -> float | None:
        if not self._shipments:
            return _ORPHAN_POLL_S if self._writes else None
        shipments = self._shipments.values()
        if any(shipment.num_writes or shipment.wants_turn for shipment in shipments):
            return 0.0
        times = [shipment.deadline for shipment in shipments]
        times += [peer.renew_at for peer in self._peers.values() if self._rank == 0 and peer.renew_sent_at is None]
        return max(0.0, min(times) - self._clock.now())

    # --- ends ---------------------------------------------------------------------------------------------------

    def _stop(self, shipment: Shipment, reason: str) -> None:
        """Post nothing more. Without an open nothing was posted; else what was posted has to end first."""
        if shipment.state is ShipmentState.OPENING:
            self._end(shipment, clean=True, reason=reason)
        elif shipment.state is ShipmentState.SHIPPING:
            shipment.advance(ShipmentState.CLOSING, self._clock.now())
            shipment.reason = reason
            self._source_free(shipment.open_id)

    def _fail(self, shipment: Shipment, reason: str) -> None:
        """What was posted may still land."""
        if shipment.state in (ShipmentState.SHIPPING, ShipmentState.CLOSING):
            self.num_failures += 1
            self._end(shipment, clean=False, reason=reason)

    def _end(self, shipment: Shipment, *, clean: bool, reason: str = "") -> None:
        told, was_live = shipment.state is ShipmentState.TOLD, shipment.is_live
        self._writes.disown(shipment)
        shipment.advance(ShipmentState.ENDED, self._clock.now())
        del self._shipments[shipment.open_id]
        if not any(other.peer == shipment.peer for other in self._shipments.values()):
            del self._peers[shipment.peer]
        if was_live:
            self._source_free(shipment.open_id)
        if not told:
            self._to_peer(
                shipment.grant.kv_address,
                KVClosed(
                    grant_id=shipment.grant.grant_id,
                    open_id=shipment.open_id,
                    source_rank=self._rank,
                    clean=clean,
                    reason=(reason or shipment.reason)[:4096],
                ),
            )
        if self._rank == 0:
            self._report(_report(shipment, clean))


def _report(shipment: Shipment, clean: bool) -> TransferReport:
    first, last, computed = shipment.first_post_at, shipment.last_done_at, shipment.computed_at
    return TransferReport(
        request_id=shipment.request_id,
        attempt=shipment.attempt,
        decode_worker=shipment.grant.grant_id.worker_id,
        num_bytes=shipment.num_bytes,
        num_blocks=len(shipment.grant.block_ids),
        transfer_s=last - first if first is not None and last is not None else 0.0,
        exposed_s=max(0.0, last - computed) if last is not None and computed is not None else 0.0,
        clean=clean,
    )
