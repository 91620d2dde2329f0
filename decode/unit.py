"""A decode worker's parts, wired: role, engine loop, receiver, transfer thread and the handoff's control socket.

router message ─[lock]─> role ─> receiver            engine loop ─> role ─> tokens to routers
prefill worker ─ socket ─[lock]─> receiver <─[lock]─ arrivals (transfer threads of all ranks)
"""

from __future__ import annotations

import msgspec
import structlog

from ..common.loop import EngineLoop
from ..common.messages import KVArrived, KVClosed, KVOpen, KVRenew, Message, RegionInfo, WorkerStatus, encode
from ..transfer.checksums import open_check
from ..transfer.followers import RankArrived, Rotated, Watch
from ..transfer.links import KVServer
from ..transfer.parts import WorkerParts
from ..transfer.receiver import KVReceiver, Verdict
from ..transfer.thread import TransferThread
from .agents import Agents
from .role import DecodeRole

log = structlog.get_logger(__name__)


class DecodeUnit:
    """Runs on the network thread, but where a method says otherwise."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._server = KVServer(parts.config.worker_id, parts.secret, self._on_message, self._on_prefill_lost)
        self._thread = TransferThread(
            parts.backend,
            on_arrived=self._on_arrived,
            on_failure=parts.on_failure,
        )
        engine = parts.engine
        self._agents = Agents(
            self._thread,
            engine.tp_size,
            broadcast=parts.group.broadcast if parts.group is not None else None,
            done=self._on_agents_replaced,
        )
        self._check = open_check(parts.config.transfer, engine.kv_pages, engine.spec, rank=0, tp_size=engine.tp_size)
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
            rotate=self._agents.start,
            checks_bytes=self._check is not None,
        )
        self.role = DecodeRole(
            pool=parts.pool,
            spec=engine.spec,
            receiver=self.receiver,
            clock=parts.clock,
            to_router=parts.to_router,
            eos_token_ids=engine.model_config.eos_token_ids,
            max_model_len=engine.model_config.max_model_len,
            max_num_batched_tokens=config.engine.max_num_batched_tokens,
            max_num_seqs=config.engine.max_num_seqs,
            num_swap_blocks=engine.num_swap_blocks,
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
        match message:
            case RankArrived():
                self._tell_arrived(message.rank, message.message, message.verdict)
            case Rotated():
                self._agents.on_rank(message)
            case _:
                raise AssertionError(f"unexpected {type(message).__name__} from rank {rank}")

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

    def _on_arrived(self, agent: str, message: KVArrived) -> None:
        """On the transfer thread: a look at the bytes takes longer than anybody should hold the lock."""
        self._tell_arrived(0, message, self._check.verdict(message) if self._check is not None else Verdict.UNCHECKED)

    def _tell_arrived(self, rank: int, message: KVArrived, verdict: Verdict) -> None:
        """On the transfer thread or the rank group's."""
        with self.loop.lock:
            self.receiver.on_arrived(rank, message, verdict)
            self._after_change()

    def _on_agents_replaced(self, regions: tuple[RegionInfo, ...] | None) -> None:
        """On the transfer thread or the rank group's."""
        with self.loop.lock:
            if regions is None:
                self.receiver.rotation_failed()
            else:
                num_blocks = self.receiver.rotated(regions)
                log.info("transfer_agents_replaced", generation=regions[0].generation, freed_blocks=num_blocks)
            self._after_change()

    def _to_prefill(self, session: str, message: Message) -> None:
        """From any thread."""
        self._parts.call_soon(lambda: self._server.send(session, message))

    @property
    def num_unfinished(self) -> int:
        """Requests, handoffs under way among them."""
        with self.loop.lock:
            return self.role.num_unfinished

    def complete_status(self, status: WorkerStatus) -> WorkerStatus:
        """With what swapping, fences and checks have done. The lock is held."""
        counters, fence = self.receiver.counters, self.receiver.fencing.fence
        return msgspec.structs.replace(
            status,
            num_swapped_blocks=self.role.scheduler.blocks.swap.num_saved_blocks,
            num_fences=fence.num_rotations,
            num_failed_fences=fence.num_failures,
            quarantine_s=self.receiver.quarantine_s(),
            checksum_failures=counters.checksum_failures,
            grant_rejects=tuple(sorted(counters.grant_rejects.items())),
        )

    num_transfer_bytes = 0  # what arrives is counted where it is written

    @property
    def num_transfer_failures(self) -> int:
        return self.receiver.num_failures

    async def close(self) -> None:
        self.loop.stop()
        await self._server.close()
        self._thread.close()
