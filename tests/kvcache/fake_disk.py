"""A disk that works when it is told to, over slots of any content."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from kvferry.kvcache.disk_tier import DiskResult, DiskTask


class FakeDisk:
    """`memory`: the slots in host memory, by number. What it holds is `content`, by its own slots."""

    def __init__(self, num_slots: int, memory: list[Any], stored: Iterable[tuple[bytes, int]] = ()) -> None:
        self.num_slots = num_slots
        self.wake: Callable[[], None] = lambda: None
        self.tasks: list[DiskTask] = []
        self.content: dict[int, tuple[bytes, Any]] = {}
        self.fails: Callable[[DiskTask], str] = lambda task: ""
        self._memory = memory
        self._stored = list(stored)
        self._results: list[DiskResult] = []

    def stored(self) -> Iterable[tuple[bytes, int]]:
        return self._stored

    def submit(self, task: DiskTask) -> None:
        self.tasks.append(task)

    def work(self, count: int = 1000, *, took_s: float = 1e-6) -> int:
        """Carry out the next tasks. How many there were."""
        tasks, self.tasks = self.tasks[:count], self.tasks[count:]
        for task in tasks:
            error = self.fails(task) or self._carry_out(task)
            self._results.append(DiskResult(task, error, took_s))
        return len(tasks)

    def _carry_out(self, task: DiskTask) -> str:
        if task.is_write:
            content = self._memory[task.host_slot]
            self.content[task.disk_slot] = (task.block_hash, list(content) if isinstance(content, list) else content)
            return ""
        known, content = self.content.get(task.disk_slot, (b"", None))
        if known != task.block_hash:
            return "not what was written"
        self._memory[task.host_slot] = content
        return ""

    def results(self) -> list[DiskResult]:
        results, self._results = self._results, []
        return results

    def close(self) -> None:
        pass
