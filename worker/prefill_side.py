"""A worker's prefill side, wired: role, sender, transfer thread and the links to decode workers.

router message ─[lock]─> role          engine loop ─> role ─> shipping ─> transfer thread ─> sender
decode worker  <─ links (network thread) ─> shipping.on_answer ─> senders of all ranks
"""

from __future__ import annotations

import threading

from ..common.messages import (
    CancelKV,
    KVDone,
    KVFetchable,
    KVFetchRefused,
    KVFetchSums,
    KVOpened,
    KVRefused,
    KVRenewed,
    Message,
    TransferReport,
)
from ..prefill.role import PrefillRole
from ..transfer.fetch.fetches import Fetches
from ..transfer.fetch.ranks import RankReading
from ..transfer.links import KVLinks
from ..transfer.protocol.checksums import open_sums
from ..transfer.protocol.handoff import Endpoint
from ..transfer.protocol.rank_messages import TO_PREFILL, PeerMessage, RankRead, ReadOutcome, SourceFree
from ..transfer.send.ranks import RankShipping
from ..transfer.send.sender import KVSender
from ..transfer.thread import TransferThread
from .deps import WorkerDeps


class PrefillSide:
    """Runs on the network thread, but where a method says otherwise."""

    def __init__(self, deps: WorkerDeps, lock: threading.Condition) -> None:
        """`lock`: the worker's. It is notified when there may be work."""
        config, engine = deps.config, deps.engine
        self._deps = deps
        self._lock = lock
        sums = open_sums(config.transfer, engine.kv_pages)
        self._links = KVLinks(config.worker_id, deps.secret, self._on_answer, self._on_decode_lost)
        self._sender = KVSender(
            rank=0,
            tp_size=engine.tp_size,
            worker_id=config.worker_id,
            incarnation=deps.incarnation,
            version=deps.version,
            backend=deps.outgoing,
            spec=engine.spec,
            num_blocks=engine.kv_pages.shape[1],
            clock=deps.clock,
            config=config.transfer,
            to_peer=self._to_decode,
            report=self._on_report,
            source_free=self._on_rank_free,
            on_read=lambda fetch_id, outcome, sums: self._on_read(0, fetch_id, outcome, sums),
            sums=sums,
            processes=deps.processes,
        )
        self._thread = TransferThread(deps.outgoing, sender=self._sender, on_failure=deps.on_failure)
        self._shipping = RankShipping(
            self._thread,
            self._sender,
            num_layers=engine.spec.num_layers,
            tp_size=engine.tp_size,
            broadcast=self._broadcast if deps.group is not None else None,
            layer_event=engine.layer_event,
            on_source_free=self._on_source_free,
        )
        endpoint = Endpoint(engine.spec, deps.version, deps.outgoing.name, engine.tp_size)
        assert self._sender.reader is not None
        broadcast = self._broadcast if deps.group is not None else None
        self.fetches = Fetches(
            pool=deps.pool,
            endpoint=endpoint,
            clock=deps.clock,
            reading=RankReading(self._thread, self._sender.reader, broadcast),
            to_peer=self._to_decode,
            has_checksums=sums is not None,
            needs_checksums=config.transfer.kv_checksum == "on",
            also_held=deps.cache.has_below,
        )
        self.role = PrefillRole(
            pool=deps.pool,
            endpoint=endpoint,
            clock=deps.clock,
            shipping=self._shipping,
            to_router=deps.to_router,
            eos_token_ids=engine.model_config.eos_token_ids,
            max_model_len=engine.model_config.max_model_len,
            max_num_batched_tokens=config.engine.max_num_batched_tokens,
            max_num_seqs=config.engine.max_num_seqs,
            own_id=config.worker_id,
            cache=deps.cache,
        )
        self.role.fetches = self.fetches

    def start(self) -> None:
        self._thread.start()

    def _broadcast(self, payload: bytes) -> None:
        assert self._deps.group is not None
        self._deps.group.broadcast(TO_PREFILL + payload)

    def on_follower(self, message: PeerMessage | SourceFree | RankRead) -> None:
        """Take another rank's message. On the rank group's thread."""
        match message:
            case PeerMessage():
                self._to_decode(message.kv_address, message.message)
            case SourceFree():
                self._on_rank_free(message.open_id)
            case RankRead():
                self._on_read(message.rank, message.fetch_id, message.outcome, message.sums)

    def _to_decode(self, kv_address: str, message: Message) -> None:
        """Send to a decode worker. From any thread."""
        self._deps.call_soon(lambda: self._links.send(kv_address, message))

    def _on_answer(self, kv_address: str, message: Message) -> None:
        if isinstance(message, KVFetchable | KVFetchSums | KVFetchRefused):
            with self._lock:
                self.fetches.on_message(message)
                self._lock.notify()
            return
        assert isinstance(message, KVOpened | KVRefused | KVRenewed | CancelKV | KVDone)
        self._shipping.on_answer(message)

    def _on_read(self, rank: int, fetch_id: int, outcome: ReadOutcome, sums: bytes) -> None:
        """Pass on a rank's end of a read. On the transfer thread or the rank group's."""
        with self._lock:
            self.fetches.on_read(rank, fetch_id, outcome, sums)
            self._lock.notify()

    def _on_decode_lost(self, kv_address: str) -> None:
        self._shipping.on_peer_lost(kv_address)
        with self._lock:
            self.fetches.on_peer_lost(kv_address)
            self._lock.notify()

    def tick(self) -> None:
        """Look at the fetches' time limits. The lock is held."""
        self.fetches.tick()

    def _on_report(self, report: TransferReport) -> None:
        """Report a shipment's end to its router. On the transfer thread."""
        with self._lock:
            router_id = self.role.router_of(report.request_id, report.attempt)
        if router_id is not None:
            self._deps.to_router(router_id, report)

    def _on_rank_free(self, open_id: int) -> None:
        """Note that a rank reads a shipment's source no more. On the transfer thread or the rank group's."""
        with self._lock:
            self._shipping.on_rank_free(open_id)

    def _on_source_free(self, open_id: int) -> None:
        """Give back the source blocks of a shipment. The lock is held."""
        self.role.on_source_free(open_id)
        self._lock.notify()

    @property
    def num_unfinished(self) -> int:
        """Tasks, and shipments that have not ended. The lock is held."""
        return self.role.num_unfinished + self._sender.num_unfinished

    @property
    def num_transfer_bytes(self) -> int:
        return self._sender.num_bytes

    @property
    def num_transfer_failures(self) -> int:
        return self._sender.num_failures

    async def close(self) -> None:
        await self._links.close()
        self._thread.close()
