"""The decode side of a worker's other tensor-parallel ranks: a registered region each, and the arrivals in it.

Block ids are rank 0's decision; a follower only tells it what has arrived and whether it is what was sent, and
replaces its agent when it is told to.
"""

from __future__ import annotations

from collections.abc import Callable

from ..common.config import TransferConfig
from ..engine.engine import Engine
from ..transfer.backends.choose import open_backend
from ..transfer.fetch.ranks import RankSumming
from ..transfer.fetch.reader import open_block_sums
from ..transfer.protocol.checksums import open_check
from ..transfer.protocol.handoff import Verdict
from ..transfer.protocol.rank_calls import Lane, OwnCalls, RankCalls
from ..transfer.protocol.rank_messages import FollowerSetup, RankArrived, RankSums, TransferBroke, agent_name
from ..transfer.thread import TransferThread
from ..wire.codec import encode
from ..wire.fields import Message
from ..wire.handoff import KVArrived
from .agents import RankAgent

# All that rank 0 has every rank do about its agent and the blocks that it lends.
RECEIVING = RankCalls(
    {
        TransferThread.watch: Lane.AT_ONCE,
        RankAgent.rotate: Lane.AT_ONCE,
        RankSumming.sum_blocks: Lane.THREAD,
    }
)


class DecodeFollower:
    """A `DecodeFollower` owns the agent through which others write to this rank's pages."""

    def __init__(self, engine: Engine, setup: FollowerSetup, send: Callable[[bytes], None]) -> None:
        self._rank = engine.tp_rank
        self._send = send
        config = TransferConfig.model_validate_json(setup.transfer)
        backend = open_backend(config.backend, agent_name(setup.worker_id, setup.incarnation, 0, self._rank))
        self.region = backend.register(engine.kv_pages, rank=self._rank, tp_size=engine.tp_size, generation=0)
        self._check = open_check(config, engine.kv_pages, engine.spec, rank=self._rank, tp_size=engine.tp_size)
        sums = open_block_sums(config, engine.kv_pages, engine.spec, engine.tp_size)
        self._thread = TransferThread(
            backend, on_arrived=self._on_arrived, on_failure=self._on_failure, prepare=engine.use_device
        )
        agent = RankAgent(self._rank, self._thread, self._say)
        self._calls = OwnCalls(
            RECEIVING, self._thread, self._thread, agent, RankSumming(self._rank, sums, self._on_sums)
        )
        self._thread.start()

    def _say(self, message: Message) -> None:
        """Tell rank 0."""
        self._send(encode(message))

    def _on_arrived(self, agent: str, message: KVArrived) -> None:
        verdict = self._check.verdict(message) if self._check is not None else Verdict.UNCHECKED
        self._say(RankArrived(rank=self._rank, message=message, verdict=verdict))

    def _on_failure(self, error: BaseException) -> None:
        self._say(TransferBroke(reason=f"{type(error).__name__}: {error}"))

    def _on_sums(self, rank: int, fetch_id: int, checksum: bytes) -> None:
        self._say(RankSums(rank=rank, fetch_id=fetch_id, checksum=checksum))

    def on_user(self, payload: bytes) -> None:
        self._calls.run(payload)

    def close(self) -> None:
        self._thread.close()
