"""The disks of a worker's ranks as one, and the prefix cache over all tiers of a worker.

rank 0   submit ──> its own thread, and a frame to every other rank, behind the steps that were sent before
rank i   when these steps' copies are done, its own thread carries the task out ──> a frame back
rank 0   a task has ended when it has on every rank; it has failed if it has on one

Before that, rank 0 opens its file and has the others open those of the same set. Where one has none, all begin anew.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec
import structlog

from ..common.clock import Clock
from ..kvcache.blocks import BlockPool
from ..kvcache.disk_files import DiskFile, DiskThread, open_file
from ..kvcache.disk_layout import DiskSet
from ..kvcache.disk_tier import SPOILT, DiskResult, DiskTask, DiskTier
from ..kvcache.prefix_cache import PrefixCache
from ..kvcache.tiers import TierIndex

if TYPE_CHECKING:
    from .engine import Engine
    from .ranks.group import RankGroup

log = structlog.get_logger(__name__)


class RankDisk:
    """Implements `disk_tier.Disk`. Results come in from threads; all other calls come with the worker's lock held."""

    def __init__(self, engine: Engine, group: RankGroup | None) -> None:
        """Raises ConfigError, and WorkerLost where another rank cannot open its file."""
        self._group = group
        self._num_ranks = engine.tp_size
        self._results: queue.SimpleQueue[DiskResult] = queue.SimpleQueue()
        self._under_way: dict[DiskTask, list[DiskResult]] = {}  # answers so far
        self.wake: Callable[[], None] = lambda: None  # called when a rank has answered, on one of the threads
        if group is not None:
            group.on_disk = self._on_result
        file = _open_set(engine, group)
        self.num_slots = engine.num_disk_slots
        self._stored = list(file.stored())
        self._thread = DiskThread(file, engine.host_slots.slot, self._on_result)

    def stored(self) -> Iterable[tuple[bytes, int]]:
        """Return rank 0's blocks: what a crash kept another rank from writing is found out when it is read."""
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
                errors = [answer.error for answer in answers if answer.error]
                error = min(errors, key=lambda one: one == SPOILT, default="")  # a disk that fails comes first
                ended.append(DiskResult(result.task, error, max(answer.took_s for answer in answers)))
        return ended

    def close(self) -> None:
        self._thread.close()


def open_disk(engine: Engine, wanted: DiskSet | None = None) -> DiskFile:
    """Open one rank's file. `wanted`: what rank 0 has opened, for the others. Raises ConfigError."""
    return open_file(
        engine.config,
        engine.spec.fingerprint,
        slot_bytes=engine.host_slots.slot_bytes,
        rank=engine.tp_rank,
        tp_size=engine.tp_size,
        wanted=wanted,
    )


def _open_set(engine: Engine, group: RankGroup | None) -> DiskFile:
    """Open the files of all ranks, which hold the same blocks: those of one set, or new ones."""
    file = open_disk(engine)
    if group is not None and not group.open_disks(msgspec.msgpack.encode(file.belongs_to)) and not file.is_new:
        file.begin_anew()
        group.open_disks(msgspec.msgpack.encode(file.belongs_to))
    return file


def open_prefix_cache(engine: Engine, pool: BlockPool, clock: Clock, group: RankGroup | None) -> PrefixCache:
    """Make the pool's cache, with the tiers that settings ask for and the engine has memory for. Raises ConfigError."""
    host = TierIndex(engine.num_host_blocks, engine.num_swap_blocks)
    if engine.config.disk_cache_dir is None:
        return PrefixCache(pool, host=host, spec=engine.spec)
    disk = RankDisk(engine, group)
    tier = DiskTier(disk, host, clock, _FailureLog())
    log.info(
        "disk_cache",
        directory=str(engine.config.disk_cache_dir),
        blocks=disk.num_slots,
        found_blocks=len(tier.index),
        host_blocks=host.num_slots,
    )
    return PrefixCache(pool, host=host, disk=tier, spec=engine.spec)


class _FailureLog:
    """Warns of tasks that have failed; of damaged blocks the first only: a crash may leave thousands of them."""

    def __init__(self) -> None:
        self._knows_damage = False

    def __call__(self, result: DiskResult) -> None:
        is_damage = result.error == SPOILT
        is_news = not (is_damage and self._knows_damage)
        self._knows_damage |= is_damage
        (log.warning if is_news else log.debug)(
            "disk_cache_failed", block=result.task.block_hash.hex(), reason=result.error
        )
