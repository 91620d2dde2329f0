"""The prefill side of handoffs: one KVSender per source rank, driven by the transfer thread alone.

    open ─KVOpened─> pages_ready (layer by layer) ─> post ─> poll ─> finish ─> KVArrived ─KVDone─> over

Nothing is posted before the decode worker's KVOpened (`opening.py`), nothing from the lease's end on: the clock is read
right before each post. The lease counts from *sending* the message that it answers, so we end before the decode worker
does, whatever the delay. A page is posted once per open. The shipment's states are drawn in `shipment.py`.

Rank 0 speaks for the handoff (KVOpen, KVRenew); the other ranks get the same calls and the same answers relayed.

Between the look at the clock and the post we may be stopped for any time, so a lease keeps order and no more. What
then protects the decode worker's blocks is told in `rotation.py`: a post names an agent, which is gone if we were taken
for lost, and a copy that we make ourselves is waited for until we say that it ended, or have ended with it.
"""

from __future__ import annotations

from collections.abc import Callable

from ...common.clock import Clock
from ...common.config import TransferConfig
from ...common.errors import TransferError
from ...common.kv_spec import KVCacheSpec
from ...wire.codec import DecodeToPrefill
from ...wire.fields import Count, Message
from ...wire.grants import GrantInfo, ProcessMark
from ...wire.results import ChoiceList
from ...wire.workers import TransferReport
from ..backends.base import Indices, TransferBackend, TransferState
from ..backends.peers import Peers
from ..fetch.reader import KVReader, Tell
from ..protocol.checksums import PageSums
from ..protocol.handoff import Endpoint, page_indices
from .answers import Answers
from .closings import Closings
from .counters import SendCounters
from .endings import Endings
from .leases import Leases
from .opening import Opening
from .outgoing_agent import OutgoingAgent
from .posting import Posting
from .shipment import Shipment, ShipmentState
from .writes import Write, Writes

MAX_IN_FLIGHT_BYTES = 64 << 20  # per decode worker: one that hangs must not hold the others' writes
MAX_WRITE_BYTES = 8 << 20  # over shared memory a post is the copy: the clock is looked at between two
_ORPHAN_POLL_S = 0.1


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
        report: Callable[[int, TransferReport], None],
        source_free: Callable[[int], None],
        on_read: Tell | None = None,
        sums: PageSums | None = None,
        processes: tuple[ProcessMark, ...] = (),
        max_in_flight_bytes: int = MAX_IN_FLIGHT_BYTES,
        max_write_bytes: int = MAX_WRITE_BYTES,
    ) -> None:
        """`num_blocks`: of our own pages. `source_free(open_id)`: the shipment reads its source blocks no more.
        `report(open_id, account)`: it has ended.

        `on_read`: hears of the reads of `reader`, which share our agent and our turns; None: there are none.
        `sums`: over our pages, where checksums are made. `processes`: of all source ranks, where they may copy into
        other processes' memory by themselves.
        """
        self._backend = backend
        self._num_blocks = num_blocks
        self._clock = clock
        self._config = config
        self._source_free = source_free
        self._shipments: dict[int, Shipment] = {}  # by open id, all but ENDED
        peers = Peers(backend)
        self.reader: KVReader | None = None
        if on_read is not None:
            self.reader = KVReader(
                rank=rank,
                backend=backend,
                spec=spec,
                tp_size=tp_size,
                num_blocks=num_blocks,
                clock=clock,
                peers=peers,
                tell=on_read,
                sums=sums,
            )
        endpoint = Endpoint(spec, version, backend.name, tp_size)
        self._writes = Writes(backend, peers, max_in_flight_bytes)
        self._posting = Posting(backend, self._writes, endpoint, rank=rank, sums=sums, max_write_bytes=max_write_bytes)
        self._opening = Opening(
            self._posting,
            endpoint,
            rank=rank,
            worker_id=worker_id,
            incarnation=incarnation,
            processes=processes,
            has_checksums=sums is not None,
            lease_s=config.lease_s,
            to_peer=to_peer,
        )
        self._leases = Leases(rank, config.renew_every_s, to_peer)
        self._closings = Closings(rank, to_peer, copies_itself=bool(processes))
        self._agent = OutgoingAgent(backend, peers, self._writes, self._closings, self.reader, rank=rank)
        self._endings = Endings(
            self._shipments,
            self._writes,
            self._leases,
            self._closings,
            clock=clock,
            source_free=source_free,
            report=report if rank == 0 else None,
        )
        self._answers = Answers(
            self._shipments, self._opening, self._posting, self._leases, self._closings, self._endings, clock
        )
        self.num_bytes = 0  # written since start
        self.made_progress = False  # a write ended in the last step: the next need not wait

    @property
    def num_unfinished(self) -> int:
        return len(self._shipments)

    @property
    def num_failures(self) -> int:
        """Shipments that ended with "may still land"."""
        return self._endings.num_failures

    def counters(self) -> SendCounters:
        return SendCounters(self.num_unfinished, self.num_bytes, self.num_failures, self._backend.telemetry_bytes)

    # --- the prefill role's calls ---------------------------------------------------------------------------

    def open(self, open_id: int, request_id: str, attempt: int, grant: GrantInfo) -> None:
        """Ask for the right to write. `open_id`: 64 random bits, new for each shipment, the same on all ranks."""
        assert open_id not in self._shipments, open_id
        now = self._clock.now()
        shipment = self._shipments[open_id] = self._opening.begin(open_id, request_id, attempt, grant, now)
        self._leases.add(shipment, now)
        self._opening.ask(shipment)

    def pages_ready(self, open_id: int, layer: int, local_blocks: Indices, remote_blocks: Indices) -> None:
        """Take blocks that are complete in this layer and will not change. In the order of our blocks, runs merge."""
        shipment = self._shipments.get(open_id)
        if shipment is not None and shipment.is_live:
            spec = shipment.grant.spec
            local = page_indices(spec, layer, local_blocks, self._num_blocks)
            remote = page_indices(spec, layer, remote_blocks, shipment.remote_num_blocks)
            shipment.add_pages(local, remote)

    def layers_done(self, open_id: int) -> None:
        """The prompt's last layer is computed: what is written from now on is exposed."""
        shipment = self._shipments.get(open_id)
        if shipment is not None:
            shipment.computed_at = self._clock.now()

    def finish(self, open_id: int, first_tokens: ChoiceList, num_cached_tokens: Count = 0) -> None:
        """Every page was given and the first tokens are known (none when resuming)."""
        shipment = self._shipments.get(open_id)
        if shipment is not None and shipment.is_live:
            shipment.finish(first_tokens, num_cached_tokens)

    def cancel(self, open_id: int, reason: str) -> None:
        """Ship nothing more. Idempotent; a shipment that has told its arrival is not taken back."""
        shipment = self._shipments.get(open_id)
        if shipment is not None:
            self._endings.stop(shipment, reason)

    # --- the decode worker's answers ------------------------------------------------------------------------

    def on_message(self, message: DecodeToPrefill) -> None:
        self._answers.take(message)

    def on_peer_lost(self, kv_address: str) -> None:
        """The control connection to a decode worker ended: its cancels no longer reach us."""
        self._leases.peer_lost(kv_address)
        for shipment in list(self._shipments.values()):
            if shipment.grant.kv_address == kv_address:
                self._endings.stop(shipment, "connection to the decode worker lost")
        self._writes.peer_lost(kv_address)

    # --- the transfer thread's turn -----------------------------------------------------------------------------

    def step(self) -> float | None:
        """Post, poll, tell, renew. Seconds until the next call is wanted; None: only after another call."""
        now = self._clock.now()
        is_held = self._agent.is_due(now)
        for shipment in list(self._shipments.values()):
            if now >= shipment.deadline:
                self._endings.lease_over(shipment)
            if not is_held:
                self._post(shipment)
        self._poll()
        for shipment in list(self._shipments.values()):
            self._settle(shipment)
        self._writes.forget_lost(self._shipments.values())
        if is_held and not any(shipment.num_writes for shipment in self._shipments.values()):
            self._replace_agent()
        self._closings.repeat(now, self._config.renew_every_s)
        self._leases.renew(self._shipments.values(), now)
        return _sooner(self._next_call_s(), self._step_reader())

    def _step_reader(self) -> float | None:
        if self.reader is None:
            return None
        wait_s = self.reader.step()
        self.made_progress |= self.reader.made_progress
        return wait_s

    def _post(self, shipment: Shipment) -> None:
        if shipment.state is ShipmentState.SHIPPING:
            try:
                self._posting.post(shipment, self._clock)
            except TransferError as error:
                self._endings.fail(shipment, str(error), has_failed=True)

    def _poll(self) -> None:
        now = self._clock.now()
        self.made_progress = False
        pending = []
        for write, state in self._writes.poll(now):
            if state is TransferState.PENDING:
                pending.append(write)
                continue
            self.made_progress = True
            if write.shipment.state is ShipmentState.ENDED:
                self._closings.write_ended(write.shipment.open_id, state, now)
            elif state is TransferState.FAILED:
                self._endings.fail(write.shipment, "a write failed", has_failed=True)
            else:
                write.shipment.num_bytes += write.handle.num_bytes
                write.shipment.last_done_at = now
                self.num_bytes += write.handle.num_bytes
        for write in pending:
            self._check_write(write, now)

    def _check_write(self, write: Write, now: float) -> None:
        if write.shipment.state is not ShipmentState.SHIPPING:
            return
        if now - self._writes.stands_since(write) > self._config.write_timeout_s:
            self._endings.fail(write.shipment, f"no write was done for {self._config.write_timeout_s} s")

    def _settle(self, shipment: Shipment) -> None:
        """Tell the arrival, again and again, or the end."""
        now = self._clock.now()
        if shipment.state is ShipmentState.SHIPPING:
            if shipment.finished and shipment.is_posted and not shipment.num_writes and now < shipment.deadline:
                shipment.advance(ShipmentState.TOLD, now)
                self._source_free(shipment.open_id)
                self._posting.tell(shipment, self._clock.now())
        elif shipment.state is ShipmentState.TOLD:
            if now - shipment.announced_at >= self._config.renew_every_s:
                self._posting.tell(shipment, self._clock.now())
        elif shipment.state is ShipmentState.CLOSING:
            if not shipment.num_writes:
                self._endings.end(shipment, clean=True)
            elif now - shipment.since > self._config.write_timeout_s:
                self._endings.fail(shipment, f"{shipment.reason}; a write is not done")

    def _replace_agent(self) -> None:
        """Shipments go on over the new agent; without one they end cleanly, and their routers look elsewhere."""
        reason = self._agent.replace(self._clock.now())
        answered = [each for each in self._shipments.values() if each.state is not ShipmentState.OPENING]
        for shipment in answered:  # the others connect when they are
            if (why := reason or self._posting.connect(shipment)) is not None:
                self._endings.stop(shipment, why)

    def _next_call_s(self) -> float | None:
        shipments = self._shipments.values()
        if any(shipment.num_writes or shipment.wants_turn for shipment in shipments):
            return 0.0
        now = self._clock.now()
        times = [*(shipment.deadline for shipment in shipments), *self._leases.next_times()]
        if (at := self._agent.next_call_at) is not None:
            times.append(at)
        if self._writes:
            times.append(now + _ORPHAN_POLL_S)
        if (at := self._closings.next_call_at(self._config.renew_every_s)) is not None:
            times.append(at)
        return max(0.0, min(times) - now) if times else None


def _sooner(one: float | None, other: float | None) -> float | None:
    return min((time for time in (one, other) if time is not None), default=None)
