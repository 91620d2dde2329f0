"""A worker's disk in virtual time: slow, failing, full, and there for the worker's next life.

submit ─> one task after the other, each takes its time ─> results, wake
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kvferry.kvcache.disk_tier import DiskResult, DiskTask

if TYPE_CHECKING:
    from .workers import Worker

Pages = list[list[int]]  # a block's tags, layer by layer


class DiskFile:
    """What outlives a worker: hash and content by slot. A write that was cut off leaves a slot without a block."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.blocks: dict[int, tuple[bytes, Pages]] = {}


class SimDisk:
    """Implements `disk_tier.Disk` for one life of a worker."""

    def __init__(self, worker: Worker, file: DiskFile) -> None:
        self.num_slots = file.num_slots
        self.wake: Callable[[], None] = lambda: None
        self._worker = worker
        self._file = file
        self._tasks: deque[DiskTask] = deque()
        self._ended: list[DiskResult] = []

    def stored(self) -> Iterable[tuple[bytes, int]]:
        """Of two slots with the same block, the first: a read failed, and the block was written once more."""
        first: dict[bytes, int] = {}
        for slot, (block_hash, _) in sorted(self._file.blocks.items()):
            first.setdefault(block_hash, slot)
        return list(first.items())

    def submit(self, task: DiskTask) -> None:
        self._tasks.append(task)
        if len(self._tasks) == 1:
            self._begin()

    def _begin(self) -> None:
        worker, task = self._worker, self._tasks[0]
        if task.is_write:
            self._file.blocks.pop(task.disk_slot, None)
        took_s = worker.world.sky.draw_disk_s(worker.place)
        worker.process.after(took_s, self._end, took_s)

    def _end(self, took_s: float) -> None:
        task, worker = self._tasks[0], self._worker
        error = "the disk failed" if worker.world.sky.fails_disk(worker.place) else self._carry_out(task)
        self._ended.append(DiskResult(task, error, took_s))
        worker.world.tally.seen[f"disk {'write' if task.is_write else 'read'}{' failed' if error else ''}"] += 1
        self._tasks.popleft()
        if self._tasks:
            self._begin()
        self.wake()

    def _carry_out(self, task: DiskTask) -> str:
        """Copy a block; what went wrong, or nothing."""
        memory, blocks = self._worker.memory, self._file.blocks
        if task.is_write:
            blocks[task.disk_slot] = (task.block_hash, memory.host_block(task.host_slot))
            return ""
        block_hash, pages = blocks.get(task.disk_slot, (b"", []))
        if block_hash != task.block_hash:
            return "another block lies there"
        memory.fill_host(task.host_slot, pages)
        return ""

    def results(self) -> list[DiskResult]:
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Nothing is held."""
