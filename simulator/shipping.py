"""A simulated worker's shipments: the messages of `transfer.send`, and bytes as times on two ports.

    open ─KVOpen─> KVOpened ─> begin_step: pages stream while they are computed ─> finish ─> all across: KVArrived
                      └─ refused, cancelled, connection lost ─> KVClosed              KVDone ─> reported

The decode worker's books are real, so every shipment says what a real one says: it asks, renews, arrives or closes.
Only its writes are not there: when the last byte is across is computed as the step begins.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..common.config import TransferConfig
from ..transfer.protocol.handoff import Endpoint, open_mac
from ..transfer.send.counters import SendCounters
from ..transfer.send.plan import ShipPlan
from ..transfer.send.shipment import ShipmentState
from ..wire.codec import DecodeToPrefill
from ..wire.grants import GrantInfo
from ..wire.handoff import CancelKV, KVArrived, KVClosed, KVDone, KVOpen, KVOpened, KVRefused, KVRenew, KVRenewed
from ..wire.results import ChoiceTokens
from ..wire.workers import TransferReport
from .costs.network import Link, Port
from .neighbour import Neighbour


@dataclass(slots=True, eq=False)
class _Shipment:
    open_id: int
    request_id: str
    attempt: int
    grant: GrantInfo
    link: Link
    port: Port  # of the receiver
    state: ShipmentState = ShipmentState.OPENING
    num_bytes: int = 0  # given so far
    began_s: float | None = None  # the first of them
    across_s: float = 0.0  # when all that was given is over there
    computed_s: float | None = None
    first_tokens: tuple[ChoiceTokens, ...] = ()
    num_cached_tokens: int = 0

    @property
    def is_live(self) -> bool:
        """Tell whether source pages are read."""
        return self.state in (ShipmentState.OPENING, ShipmentState.SHIPPING)

    def report(self) -> TransferReport:
        began_s, computed_s = self.began_s, self.computed_s
        return TransferReport(
            request_id=self.request_id,
            attempt=self.attempt,
            decode_worker=self.grant.grant_id.worker_id,
            num_bytes=self.num_bytes,
            num_blocks=len(self.grant.block_ids),
            transfer_s=self.across_s - began_s if began_s is not None else 0.0,
            exposed_s=max(0.0, self.across_s - computed_s) if computed_s is not None else 0.0,
            clean=True,
        )


class SimShipping:
    """Implements `prefill.shipments.Shipping` for all ranks of a worker. Its port sends."""

    def __init__(
        self, worker: Neighbour, endpoint: Endpoint, config: TransferConfig, *, block_bytes: int, port: Port
    ) -> None:
        self._worker = worker
        self._endpoint = endpoint
        self._config = config
        self._block_bytes = block_bytes
        self._port = port
        self._shipments: dict[int, _Shipment] = {}  # by open id, all but those that have ended
        self._is_renewing = False
        self._num_bytes = 0

    # --- the prefill role's calls -------------------------------------------------------------------------------

    def open(self, request_id: str, attempt: int, grant: GrantInfo) -> int:
        worker, endpoint = self._worker, self._endpoint
        link, port = worker.path_to(grant.kv_address)
        open_id = worker.next_number()
        self._shipments[open_id] = _Shipment(open_id, request_id, attempt, grant, link, port)
        worker.to_target(
            grant.kv_address,
            KVOpen(
                grant_id=grant.grant_id,
                open_id=open_id,
                mac=open_mac(grant, request_id, attempt),
                worker_id=worker.worker_id,
                incarnation=worker.incarnation,
                spec=endpoint.spec,
                version=endpoint.version,
                transport=endpoint.transport,
                tp_size=endpoint.tp_size,
            ),
        )
        if not self._is_renewing:
            self._is_renewing = True
            worker.after(self._config.renew_every_s, self._renew)
        return open_id

    def begin_step(self, plans: list[ShipPlan]) -> None:
        """Ship what the step completes: all of it shares our port, and a layer follows the other."""
        begin_s, end_s = self._worker.step_s
        streams: list[tuple[_Shipment, float]] = []
        for plan in plans:
            shipment = self._shipments.get(plan.open_id)
            if shipment is None or not shipment.is_live or not plan.local_blocks:
                continue
            num_pages = self._endpoint.spec.num_pages(len(plan.local_blocks), plan.num_thin)
            num_bytes = self._block_bytes * num_pages // self._endpoint.spec.num_layers
            shipment.num_bytes += num_bytes
            self._num_bytes += num_bytes
            seconds = num_bytes / shipment.link.bytes_per_s
            if shipment.began_s is None:
                shipment.began_s = begin_s
            if plan.all_layers:  # it is there already
                sent_s = self._port.carry(begin_s, seconds)
                shipment.across_s = shipment.port.carry(sent_s - seconds, seconds) + shipment.link.latency_s
            else:
                streams.append((shipment, seconds))
        if not streams:
            return
        num_layers = self._endpoint.spec.num_layers
        sent_s = self._port.stream(begin_s, end_s, sum(seconds for _, seconds in streams), num_layers)
        for shipment, seconds in streams:
            received_s = shipment.port.stream(begin_s, end_s, seconds, num_layers)
            shipment.across_s = max(sent_s, received_s) + shipment.link.latency_s

    def on_layer(self, layer: int) -> None:
        """Layers are counted into the step's time."""

    def finish(self, open_id: int, first_tokens: tuple[ChoiceTokens, ...], num_cached_tokens: int = 0) -> None:
        shipment = self._shipments.get(open_id)
        if shipment is not None and shipment.is_live:
            shipment.computed_s, shipment.first_tokens = self._worker.now(), first_tokens
            shipment.num_cached_tokens = num_cached_tokens
            if shipment.state is ShipmentState.SHIPPING:
                self._tell_when_across(shipment)

    def cancel(self, open_id: int, reason: str) -> None:
        shipment = self._shipments.get(open_id)
        if shipment is not None:
            self._worker.after(0.0, self._stop, shipment, reason)

    def counters(self) -> SendCounters:
        return SendCounters(len(self._shipments), self._num_bytes, 0, 0)

    # --- arrivals -----------------------------------------------------------------------------------------------

    def _tell_when_across(self, shipment: _Shipment) -> None:
        now = self._worker.now()
        shipment.across_s = max(shipment.across_s, now)
        self._worker.after(shipment.across_s - now, self._arrive, shipment)

    def _arrive(self, shipment: _Shipment) -> None:
        """All is written: the notification travels with the last byte."""
        if shipment.state is not ShipmentState.SHIPPING:
            return
        shipment.state = ShipmentState.TOLD
        grant = shipment.grant
        self._worker.notify(
            grant.kv_address,
            KVArrived(
                grant_id=grant.grant_id,
                open_id=shipment.open_id,
                source_rank=0,
                num_tokens=grant.num_tokens,
                first_tokens=shipment.first_tokens,
                num_cached_tokens=shipment.num_cached_tokens,
            ),
        )
        self._worker.core.on_source_free(shipment.open_id)

    # --- the decode worker's answers ----------------------------------------------------------------------------

    def on_answer(self, message: DecodeToPrefill) -> None:
        if isinstance(message, KVRenewed):
            self._on_renewed(message)
            return
        shipment = self._shipments.get(message.open_id)
        if shipment is None:
            return
        match message:
            case KVOpened():
                self._on_opened(shipment)
            case KVRefused():
                self._end(shipment)
            case CancelKV():
                self._stop(shipment, "cancelled by the decode worker")
            case KVDone():
                if shipment.state is ShipmentState.TOLD:
                    self._end(shipment)
                else:
                    self._stop(shipment, "the decode worker needs nothing more")

    def _on_opened(self, shipment: _Shipment) -> None:
        if shipment.state is ShipmentState.OPENING:
            shipment.state = ShipmentState.SHIPPING
            if shipment.computed_s is not None:  # it waited while the agents over there were replaced
                self._tell_when_across(shipment)

    def _on_renewed(self, message: KVRenewed) -> None:
        for _, open_id, lease_s in message.opens:
            shipment = self._shipments.get(open_id)
            if shipment is not None and lease_s <= 0:
                self._stop(shipment, "the decode worker no longer knows the handoff")

    def on_target_lost(self, kv_address: str) -> None:
        """Note that a decode worker is gone."""
        for shipment in list(self._shipments.values()):
            if shipment.grant.kv_address == kv_address:
                self._end(shipment)

    def _renew(self) -> None:
        """Renew what is open, a message for each decode worker."""
        opens: dict[str, list[_Shipment]] = {}
        for shipment in self._shipments.values():
            if shipment.state in (ShipmentState.SHIPPING, ShipmentState.TOLD):
                opens.setdefault(shipment.grant.kv_address, []).append(shipment)
        for kv_address, shipments in opens.items():
            pairs = tuple((shipment.grant.grant_id, shipment.open_id) for shipment in shipments)
            self._worker.to_target(kv_address, KVRenew(opens=pairs))
        self._is_renewing = bool(self._shipments)
        if self._is_renewing:
            self._worker.after(self._config.renew_every_s, self._renew)

    # --- ends ---------------------------------------------------------------------------------------------------

    def _stop(self, shipment: _Shipment, reason: str) -> None:
        """Ship nothing more, and say so when what is on its way is over there."""
        if shipment.is_live:
            left_s = 0.0
            if shipment.state is ShipmentState.SHIPPING:
                left_s = max(0.0, shipment.across_s - self._worker.now())
            shipment.state = ShipmentState.CLOSING
            self._worker.core.on_source_free(shipment.open_id)
            self._worker.after(left_s, self._close, shipment, reason)

    def _close(self, shipment: _Shipment, reason: str) -> None:
        grant_id, open_id = shipment.grant.grant_id, shipment.open_id
        closed = KVClosed(grant_id=grant_id, open_id=open_id, source_rank=0, clean=True, reason=reason)
        self._worker.to_target(shipment.grant.kv_address, closed)
        self._end(shipment)

    def _end(self, shipment: _Shipment) -> None:
        if self._shipments.pop(shipment.open_id, None) is None:
            return
        was_live, shipment.state = shipment.is_live, ShipmentState.ENDED
        if was_live:
            self._worker.core.on_source_free(shipment.open_id)
        self._worker.core.on_report(shipment.open_id, shipment.report())
