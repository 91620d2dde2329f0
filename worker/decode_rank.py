"""The decode side of a worker's other tensor-parallel ranks: a registered region each, and the arrivals in it.

Block ids are rank 0's decision; a follower only tells it what has arrived and whether it is what was sent, and
replaces its agent when it is told to.
"""

from __future__ import annotations

from collections.abc import Callable

from ..common.config import TransferConfig
from ..common.errors import TransferError
from ..common.messages import Decoder, KVArrived, RegionInfo, encode
from ..engine.engine import Engine
from ..transfer.backends.choose import open_backend
from ..transfer.fetch.reader import open_block_sums
from ..transfer.protocol.checksums import open_check
from ..transfer.protocol.handoff import Verdict
from ..transfer.protocol.rank_messages import (
    FollowerSetup,
    RankArrived,
    RankSums,
    Rotate,
    SumBlocks,
    TransferBroke,
    Watch,
    agent_name,
)
from ..transfer.thread import TransferThread
from .agents import rotated

_commands: Decoder[Watch | Rotate | SumBlocks] = Decoder(Watch | Rotate | SumBlocks)


class DecodeFollower:
    """A `DecodeFollower` owns the agent through which others write to this rank's pages."""

    def __init__(self, engine: Engine, setup: FollowerSetup, send: Callable[[bytes], None]) -> None:
        self._rank = engine.tp_rank
        self._send = send
        config = TransferConfig.model_validate_json(setup.transfer)
        backend = open_backend(config.backend, agent_name(setup.worker_id, setup.incarnation, 0, self._rank))
        self.region = backend.register(engine.kv_pages, rank=self._rank, tp_size=engine.tp_size, generation=0)
        self._check = open_check(config, engine.kv_pages, engine.spec, rank=self._rank, tp_size=engine.tp_size)
        self._sums = open_block_sums(config, engine.kv_pages, engine.spec, engine.tp_size)
        self._thread = TransferThread(backend, on_arrived=self._on_arrived, on_failure=self._on_failure)
        self._thread.start()

    def _on_arrived(self, agent: str, message: KVArrived) -> None:
        verdict = self._check.verdict(message) if self._check is not None else Verdict.UNCHECKED
        self._send(encode(RankArrived(rank=self._rank, message=message, verdict=verdict)))

    def _on_failure(self, error: BaseException) -> None:
        self._send(encode(TransferBroke(reason=f"{type(error).__name__}: {error}")))

    def on_user(self, payload: bytes) -> None:
        match _commands.decode(payload):
            case Watch(on=on):
                self._thread.watch(on)
            case Rotate(generation=generation):
                self._thread.rotate(generation, lambda result: self._on_rotated(generation, result))
            case SumBlocks(fetch_id=fetch_id, blocks=blocks):
                self._thread.call(self._sum, fetch_id, blocks)

    def _sum(self, fetch_id: int, blocks: tuple[int, ...]) -> None:
        assert self._sums is not None, "rank 0 makes checksums where all do"
        self._send(encode(RankSums(rank=self._rank, fetch_id=fetch_id, checksum=self._sums.make(blocks))))

    def _on_rotated(self, generation: int, result: RegionInfo | TransferError) -> None:
        self._send(encode(rotated(self._rank, generation, result)))

    def close(self) -> None:
        self._thread.close()
