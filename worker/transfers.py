"""A worker's transfers on its machine: rank 0's two transfer threads, and the calls that reach those of all ranks.

    core ─> shipping, reading, rotate, watch, sum_loan ─> the own thread and every other rank's
    own threads, other ranks (on_follower) ─> Heard

The other ranks' sides are `decode_rank.py` and `prefill_rank.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..common.request import BlockId
from ..transfer.fetch.ranks import RankReading, RankSumming
from ..transfer.fetch.reader import open_block_sums
from ..transfer.protocol.checksums import open_check, open_sums
from ..transfer.protocol.handoff import Verdict
from ..transfer.protocol.rank_calls import Each
from ..transfer.protocol.rank_messages import (
    TO_DECODE,
    TO_PREFILL,
    PeerMessage,
    RankArrived,
    RankRead,
    RankSums,
    ReadOutcome,
    Rotated,
    SourceFree,
)
from ..transfer.send.ranks import RankShipping
from ..transfer.send.sender import KVSender
from ..transfer.thread import TransferThread
from ..wire.fields import Message
from ..wire.grants import RegionInfo
from ..wire.handoff import KVArrived
from ..wire.workers import TransferReport
from .agents import Agents
from .decode_rank import RECEIVING
from .deps import WorkerDeps


class Heard(Protocol):
    """Whoever hears what became of transfers, on a transfer thread or the rank group's."""

    def to_target(self, kv_address: str, message: Message) -> None: ...
    def on_arrived(self, rank: int, message: KVArrived, verdict: Verdict) -> None: ...
    def on_rotated(self, regions: tuple[RegionInfo, ...] | None) -> None: ...
    def on_sums(self, rank: int, fetch_id: int, checksum: bytes) -> None: ...
    def on_read(self, rank: int, fetch_id: int, outcome: ReadOutcome, sums: bytes) -> None: ...
    def on_report(self, open_id: int, report: TransferReport) -> None: ...

    def on_rank_free(self, open_id: int) -> None:
        """One rank reads a shipment's source blocks no more: to be told to `shipping`, under the lock."""
        ...

    def on_source_free(self, open_id: int) -> None:
        """No rank does any more. `shipping` says so, so that the lock is held."""
        ...


class Transfers:
    """`Transfers` has both agents' threads, which run from `start` to `close` of each."""

    def __init__(self, deps: WorkerDeps, heard: Heard) -> None:
        engine, config = deps.engine, deps.config.transfer
        self._deps = deps
        self._heard = heard
        self._sums = open_sums(config, engine.kv_pages)
        self._loan_sums = open_block_sums(config, engine.kv_pages, engine.spec, engine.tp_size)
        self._check = open_check(config, engine.kv_pages, engine.spec, rank=0, tp_size=engine.tp_size)
        self.incoming = TransferThread(
            deps.backend, on_arrived=self._on_arrived, on_failure=deps.on_failure, prepare=engine.use_device
        )
        sender = self._make_sender()
        self.outgoing = TransferThread(
            deps.outgoing, sender=sender, on_failure=deps.on_failure, prepare=engine.use_device
        )
        self.shipping = RankShipping(
            self.outgoing,
            sender,
            spec=engine.spec,
            tp_size=engine.tp_size,
            broadcast=self._broadcast(TO_PREFILL),
            layer_event=engine.layer_event,
            on_source_free=heard.on_source_free,
        )
        assert sender.reader is not None
        self.reading = RankReading(self.shipping.each, sender.reader)
        self._each = Each(RECEIVING, self.incoming, self._broadcast(TO_DECODE))
        self._agents = Agents(self._each, self.incoming, engine.tp_size, done=heard.on_rotated)
        self._summing = RankSumming(0, self._loan_sums, heard.on_sums)

    def _make_sender(self) -> KVSender:
        deps, engine, heard = self._deps, self._deps.engine, self._heard
        return KVSender(
            rank=0,
            tp_size=engine.tp_size,
            worker_id=deps.config.worker_id,
            incarnation=deps.incarnation,
            version=deps.version,
            backend=deps.outgoing,
            spec=engine.spec,
            num_blocks=engine.kv_pages.shape[1],
            clock=deps.clock,
            config=deps.config.transfer,
            to_peer=heard.to_target,
            report=heard.on_report,
            source_free=heard.on_rank_free,
            on_read=lambda fetch_id, outcome, sums: heard.on_read(0, fetch_id, outcome, sums),
            sums=self._sums,
            processes=deps.processes,
        )

    def _broadcast(self, side: bytes) -> Callable[[bytes], None] | None:
        """Return what reaches this side of the other ranks; None: there are none."""
        group = self._deps.group
        return None if group is None else lambda payload: group.broadcast(side + payload)

    # --- what is summed -----------------------------------------------------------------------------------------

    @property
    def checks_bytes(self) -> bool:
        """Tell whether arrivals that carry checksums come with a verdict."""
        return self._check is not None

    @property
    def sums_writes(self) -> bool:
        """Tell whether what we write or read is summed."""
        return self._sums is not None

    @property
    def sums_loans(self) -> bool:
        """Tell whether what others read here is summed."""
        return self._loan_sums is not None

    # --- on every rank ------------------------------------------------------------------------------------------

    def rotate(self, generation: int) -> None:
        """Replace the agents through which others write; heard as `on_rotated`."""
        self._agents.start(generation)

    def watch(self, on: bool) -> None:
        """Let others' writes and reads make progress, or save the effort."""
        self._each(self.incoming.watch, on)

    def sum_loan(self, fetch_id: int, blocks: tuple[BlockId, ...], num_thin: int) -> None:
        """Sum lent blocks; heard as `on_sums` of each rank."""
        self._each(self._summing.sum_blocks, fetch_id, blocks, num_thin)

    # --- what is heard ------------------------------------------------------------------------------------------

    def _on_arrived(self, agent: str, message: KVArrived) -> None:
        """Check what arrived before the lock is taken: that takes longer than anybody should hold it."""
        verdict = self._check.verdict(message) if self._check is not None else Verdict.UNCHECKED
        self._heard.on_arrived(0, message, verdict)

    def on_follower(self, rank: int, message: Message) -> None:
        """Take another rank's message. On the rank group's thread."""
        heard = self._heard
        match message:
            case PeerMessage():
                heard.to_target(message.kv_address, message.message)
            case SourceFree():
                heard.on_rank_free(message.open_id)
            case RankRead():
                heard.on_read(message.rank, message.fetch_id, message.outcome, message.sums)
            case RankArrived():
                heard.on_arrived(message.rank, message.message, message.verdict)
            case Rotated():
                self._agents.on_rank(message)
            case RankSums():
                heard.on_sums(message.rank, message.fetch_id, message.checksum)
            case _:
                raise AssertionError(f"unexpected {type(message).__name__} from rank {rank}")
