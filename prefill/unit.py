"""A prefill worker's parts, wired: role, engine loop, sender, transfer thread and the links to decode workers.

router message ─[lock]─> role          engine loop ─> role ─> shipping ─> transfer thread ─> sender
decode worker  <─ links (network thread) ─> shipping.on_answer ─> senders of all ranks
"""

from __future__ import annotations

from ..common.loop import EngineLoop
from ..common.messages import (
    CancelKV,
    KVDone,
    KVOpened,
    KVRefused,
    KVRenewed,
    Message,
    TransferReport,
    WorkerStatus,
)
from ..transfer.checksums import open_sums
from ..transfer.followers import PeerMessage, SourceFree
from ..transfer.handoff import Endpoint
from ..transfer.links import KVLinks
from ..transfer.parts import WorkerParts
from ..transfer.sender import KVSender
from ..transfer.thread import TransferThread
from .role import PrefillRole
from .shipping import RankShipping


class PrefillUnit:
    """Runs on the network thread, but where a method says otherwise."""

    kv_address = ""  # nobody connects to a prefill worker

    def __init__(self, parts: WorkerParts) -> None:
        config, engine = parts.config, parts.engine
        self._parts = parts
        self._links = KVLinks(config.worker_id, parts.secret, self._on_answer, self._on_decode_lost)
        self._sender = KVSender(
            rank=0,
            tp_size=engine.tp_size,
            worker_id=config.worker_id,
            incarnation=parts.incarnation,
            version=parts.version,
            backend=parts.backend,
            spec=engine.spec,
            num_blocks=engine.kv_pages.shape[1],
            clock=parts.clock,
            config=config.transfer,
            to_peer=self._to_decode,
            report=self._on_report,
            source_free=self._on_rank_free,
            sums=open_sums(config.transfer, engine.kv_pages),
            processes=parts.processes,
        )
        self._thread = TransferThread(parts.backend, sender=self._sender, on_failure=parts.on_failure)
        self._shipping = RankShipping(
            self._thread,
            self._sender,
            num_layers=engine.spec.num_layers,
            tp_size=engine.tp_size,
            broadcast=parts.group.broadcast if parts.group is not None else None,
            layer_fence=engine.layer_fence,
            on_source_free=self._on_source_free,
        )
        self.role = PrefillRole(
            pool=parts.pool,
            endpoint=Endpoint(engine.spec, parts.version, parts.backend.name, engine.tp_size),
            clock=parts.clock,
            shipping=self._shipping,
            to_router=parts.to_router,
            eos_token_ids=engine.model_config.eos_token_ids,
            max_model_len=engine.model_config.max_model_len,
            max_num_batched_tokens=config.engine.max_num_batched_tokens,
            max_num_seqs=config.engine.max_num_seqs,
        )
        self.loop = EngineLoop(self.role, engine.step, parts.on_failure)

    async def start(self) -> None:
        self._thread.start()
        self.loop.start()

    def on_router_message(self, router_id: str, message: Message) -> None:
        with self.loop.lock:
            self.role.on_router_message(router_id, message)
            self.loop.wake()

    def on_router_lost(self, router_id: str) -> None:
        with self.loop.lock:
            self.role.on_router_lost(router_id)

    def on_follower(self, rank: int, message: Message) -> None:
        """From another rank. On the rank group's thread."""
        match message:
            case PeerMessage():
                self._to_decode(message.kv_address, message.message)
            case SourceFree():
                self._on_rank_free(message.open_id)
            case _:
                raise AssertionError(f"unexpected {type(message).__name__} from rank {rank}")

    def tick(self) -> None:
        """Deadlines are the sender's, on its own thread."""

    def _to_decode(self, kv_address: str, message: Message) -> None:
        """From any thread."""
        self._parts.call_soon(lambda: self._links.send(kv_address, message))

    def _on_answer(self, kv_address: str, message: Message) -> None:
        assert isinstance(message, KVOpened | KVRefused | KVRenewed | CancelKV | KVDone)
        self._shipping.on_answer(message)

    def _on_decode_lost(self, kv_address: str) -> None:
        self._shipping.on_peer_lost(kv_address)

    def _on_report(self, report: TransferReport) -> None:
        """On the transfer thread."""
        with self.loop.lock:
            router_id = self.role.router_of(report.request_id, report.attempt)
        if router_id is not None:
            self._parts.to_router(router_id, report)

    def _on_rank_free(self, open_id: int) -> None:
        """On the transfer thread or the rank group's."""
        with self.loop.lock:
            self._shipping.on_rank_free(open_id)

    def _on_source_free(self, open_id: int) -> None:
        """With the lock held."""
        self.role.on_source_free(open_id)
        self.loop.wake()

    @property
    def num_unfinished(self) -> int:
        """Tasks, and shipments that have not ended."""
        with self.loop.lock:
            return self.role.num_unfinished + self._sender.num_unfinished

    def complete_status(self, status: WorkerStatus) -> WorkerStatus:
        """Everything about handoffs is in it: fences and checks are a decode worker's."""
        return status

    @property
    def num_transfer_bytes(self) -> int:
        return self._sender.num_bytes

    @property
    def num_transfer_failures(self) -> int:
        return self._sender.num_failures

    async def close(self) -> None:
        self.loop.stop()
        await self._links.close()
        self._thread.close()
