"""What a worker gives its role to work with: made once by `worker.py`, taken by `PrefillUnit` or `DecodeUnit`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..common.blocks import BlockPool
from ..common.clock import Clock
from ..common.config import WorkerConfig
from ..common.engine import Engine
from ..common.messages import Message, ProcessMark, RegionInfo
from ..common.parallel import RankGroup
from .base import TransferBackend


@dataclass(frozen=True, slots=True)
class WorkerParts:
    config: WorkerConfig
    secret: bytes
    version: str
    incarnation: int
    clock: Clock
    engine: Engine
    group: RankGroup | None  # the other tensor-parallel ranks
    pool: BlockPool
    backend: TransferBackend
    regions: tuple[RegionInfo, ...]  # of every rank
    to_router: Callable[[str, Message], None]  # from any thread
    call_soon: Callable[[Callable[[], None]], None]  # onto the network thread, from any thread
    on_failure: Callable[[BaseException], None]  # a thread of this worker has ended
    processes: tuple[ProcessMark, ...] = ()  # of every rank, where they may copy into other processes' memory
