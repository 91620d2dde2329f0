"""The disks of a worker's ranks as one, and the prefix cache over all tiers of a worker.

rank 0   submit ──> its own thread, and a frame to every other rank, behind the steps that were sent before
rank i   when these steps' copies are done, its own thread carries the task out ──> a frame back
rank 0   a task has ended when it has on every rank; it has failed if it has on one
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec
import structlog

from ..common.clock import Clock
from ..kvcache.blocks import BlockPool
from ..kvcache.disk_files import DiskThread, open_file
from ..kvcache.disk_tier import DiskResult, DiskTask, DiskTier
from ..kvcache.prefix_cache import PrefixCache
from ..kvcache.tiers import TierIndex

if TYPE_CHECKING:
    from .engine import Engine
    from .ranks.group import RankGroup

log = structlog.get_logger(__name__)


class RankDisk:
    """Implements `disk_tier.Disk`. Results come in from threads; all other calls come with the worker's lock held."""

    def __init__(self, engine: Engine, group: RankGroup | None) -> None:
        """Raises ConfigError."""
        self._group = group
        self._num_ranks = engine.tp_size
        self._results: queue.SimpleQueue[DiskResult] = queue.SimpleQueue()
        self._under_way: dict[DiskTask, list[DiskResult]] = {}  # answers so far
        self.wake: Callable[[], None] = lambda: None  # called when a rank has answered, on one of the threads
        if group is not None:
            group.on_disk = self._on_result
        self._thread, stored = open_disk(engine, self._on_result)
        self.num_slots = engine.num_disk_slots
        self._stored = stored

    def stored(self) -> Iterable[tuple[bytes, int]]:
        """Return rank 0's blocks: what another rank lacks is found out when it is read."""
        return self._stored

    def submit(self, task: DiskTask) -> None:
        self._under_way[task] = []
        if self._group is not None:
            self._group.send_disk(msgspec.msgpack.encode(task))
        self._thread.submit(task)

    def _on_result(self, result: DiskResult) -> None:
        self._results.put(result)
        self.wake()

    def results(self) -> list[DiskResult]:
        ended = []
        while not self._results.empty():
            result = self._results.get_nowait()
            answers = self._under_way[result.task]
            answers.append(result)
            if len(answers) == self._num_ranks:
                del self._under_way[result.task]
                error = next((answer.error for answer in answers if answer.error), "")
                ended.append(DiskResult(result.task, error, max(answer.took_s for answer in answers)))
        return ended

    def close(self) -> None:
        self._thread.close()


def open_disk(engine: Engine, on_result: Callable[[DiskResult], None]) -> tuple[DiskThread, list[tuple[bytes, int]]]:
    """Open one rank's disk and return what lies there. Raises ConfigError."""
    slots = engine.host_slots
    file = open_file(
        engine.config, engine.spec.fingerprint, slot_bytes=slots.slot_bytes, rank=engine.tp_rank, tp_size=engine.tp_size
    )
    stored = list(file.stored())
    return DiskThread(file, slots.slot, on_result), stored


def open_prefix_cache(engine: Engine, pool: BlockPool, clock: Clock, group: RankGroup | None) -> PrefixCache:
    """Make the pool's cache, with the tiers that settings ask for and the engine has memory for. Raises ConfigError."""
    host = TierIndex(engine.num_host_blocks, engine.num_swap_blocks)
    if engine.config.disk_cache_dir is None:
        return PrefixCache(pool, host=host, spec=engine.spec)
    disk = RankDisk(engine, group)
    tier = DiskTier(disk, host, clock, _report)
    log.info(
        "disk_cache",
        directory=str(engine.config.disk_cache_dir),
        blocks=disk.num_slots,
        found_blocks=len(tier.index),
        host_blocks=host.num_slots,
    )
    return PrefixCache(pool, host=host, disk=tier, spec=engine.spec)


def _report(result: DiskResult) -> None:
    log.warning("disk_cache_failed", block=result.task.block_hash.hex(), reason=result.error)
