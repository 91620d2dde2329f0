"""`WorkerDeps` is what a worker's sides work with: made once by `process.py`, taken by `PrefillSide` and `DecodeSide`.

It has two transfer agents over the same pages. Through one of them others write into our pages; it is replaced to
fence a writer. The other one writes into pages elsewhere; it is replaced when its own writes cannot be waited for.
Neither replacement may end what goes the other way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..common.clock import Clock
from ..common.config import WorkerConfig
from ..common.credentials import SharedSecret
from ..common.messages import Message, ProcessMark, RegionInfo, StepSample
from ..engine.engine import Engine
from ..engine.ranks.group import RankGroup
from ..kvcache.blocks import BlockPool
from ..kvcache.prefix_cache import PrefixCache
from ..transfer.backends.base import TransferBackend


@dataclass(frozen=True, slots=True)
class WorkerDeps:
    config: WorkerConfig
    secret: SharedSecret
    version: str
    incarnation: int
    clock: Clock
    engine: Engine
    group: RankGroup | None  # the other tensor-parallel ranks
    pool: BlockPool
    cache: PrefixCache  # around it
    backend: TransferBackend  # others write through it
    outgoing: TransferBackend  # we write through it
    regions: tuple[RegionInfo, ...]  # of every rank's `backend`
    to_router: Callable[[str, Message], None]  # from any thread
    call_soon: Callable[[Callable[[], None]], None]  # onto the network thread, from any thread
    on_failure: Callable[[BaseException], None]  # a thread of this worker has ended
    processes: tuple[ProcessMark, ...] = ()  # of every rank, where they may copy into other processes' memory
    samples: tuple[StepSample, ...] = ()  # of the calibration at start-up
