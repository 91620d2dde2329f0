"""A decode worker's parts, wired: role, engine loop, receiver, transfer thread and the handoff's control socket.

router message ─[lock]─> role ─> receiver            engine loop ─> role ─> tokens to routers
prefill worker ─ socket ─[lock]─> receiver <─[lock]─ arrivals (transfer threads of all ranks)
"""

from __future__ import annotations

from ..common.loop import EngineLoop
from ..common.messages import KVArrived, KVClosed, KVOpen, KVRenew, Message, encode
from ..transfer.followers import RankArrived, Watch
from ..transfer.links import KVServer
from ..transfer.parts import WorkerParts
from ..transfer.receiver import KVReceiver
from ..transfer.thread import TransferThread
from .role import DecodeRole


class DecodeUnit:
    """Runs on the network thread, but where a method says otherwise."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._server = KVServer(parts.config.worker_id, parts.secret, self._on_message, self._on_prefill_lost)
        self._thread = TransferThread(
            parts.backend,
            on_arrived=lambda agent, message: self._on_arrived(0, message),
            on_failure=parts.on_failure,
        )
        self._watching = False
        self.kv_address = ""

    async def start(self) -> None:
        parts, config, engine = self._parts, self._parts.config, self._parts.engine
        self.kv_address = str(await self._server.start(config.host, config.port))
        self.receiver = KVReceiver(
            worker_id=config.worker_id,
            incarnation=parts.incarnation,
            spec=engine.spec,
            tp_size=engine.tp_size,
            pool=parts.pool,
            regions=parts.regions,
            kv_address=self.kv_address,
            config=config.transfer,
            clock=parts.clock,
            version=parts.version,
            transport=parts.backend.name,
            to_router=parts.to_router,
            to_peer=self._to_prefill,
        )
        self.role = DecodeRole(
            pool=parts.pool,
            spec=engine.spec,
            receiver=self.receiver,
            to_router=parts.to_router,
            eos_token_ids=engine.model_config.eos_token_ids,
            max_model_len=engine.model_config.max_model_len,
            max_num_batched_tokens=config.engine.max_num_batched_tokens,
            max_num_seqs=config.engine.max_num_seqs,
        )
        self.loop = EngineLoop(self.role, engine.step, parts.on_failure)
        self._thread.start()
        self.loop.start()

    def on_router_message(self, router_id: str, message: Message) -> None:
        with self.loop.lock:
            self.role.on_router_message(router_id, message)
            self._after_change()

    def on_router_lost(self, router_id: str) -> None:
        with self.loop.lock:
            self.role.on_router_lost(router_id)
            self._after_change()

    def on_follower(self, rank: int, message: Message) -> None:
        """From another rank. On the rank group's thread."""
        assert isinstance(message, RankArrived), f"unexpected {type(message).__name__} from rank {rank}"
        self._on_arrived(message.rank, message.message)

    def tick(self) -> None:
        """Deadlines; ten times a second."""
        with self.loop.lock:
            self.role.tick()
            self._after_change()

    def _after_change(self) -> None:
        """With the lock held: notifications are polled while somebody may write; there may be work."""
        if self._watching != self.receiver.has_open:
            self._watching = self.receiver.has_open
            self._thread.watch(self._watching)
            if self._parts.group is not None:
                self._parts.group.broadcast(encode(Watch(on=self._watching)))
        self.loop.wake()

    def _on_message(self, session: str, message: Message) -> None:
        assert isinstance(message, KVOpen | KVRenew | KVClosed)
        with self.loop.lock:
            self.receiver.on_message(session, message)
            self._after_change()

    def _on_prefill_lost(self, session: str) -> None:
        with self.loop.lock:
            self.receiver.on_session_lost(session)
            self._after_change()

    def _on_arrived(self, rank: int, message: KVArrived) -> None:
        """On the transfer thread or the rank group's."""
        with self.loop.lock:
            self.receiver.on_arrived(rank, message)
            self._after_change()

    def _to_prefill(self, session: str, message: Message) -> None:
        """From any thread."""
        self._parts.call_soon(lambda: self._server.send(session, message))

    num_transfer_bytes = 0  # what arrives is counted where it is written

    @property
    def num_transfer_failures(self) -> int:
        return self.receiver.num_failures

    async def close(self) -> None:
        self.loop.stop()
        await self._server.close()
        self._thread.close()
