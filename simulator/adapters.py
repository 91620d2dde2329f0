"""Adapters of a simulated fleet: which request names which, and how long a worker takes to load one.

Few are asked for often and many rarely: the k-th with a weight of 1/k. A step takes no longer with adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from ..common.adapter import AdapterResult, AdapterTask
from ..router.state.adapter_use import LOAD_S, READ_BYTES_PER_S, AdapterUse

if TYPE_CHECKING:
    from .scenario import Adapters


class AdapterChoice:
    """Draws the adapter of one request after another; 0: none is served."""

    def __init__(self, adapters: Adapters, seed: int) -> None:
        self._numbers = range(1, 1 + adapters.count)
        self._weights = [1 / number for number in self._numbers]
        self._random = Random(f"adapters {seed}")

    def draw(self) -> int:
        return self._random.choices(self._numbers, self._weights)[0] if self._numbers else 0


def adapter_use(number: int, num_bytes: int) -> AdapterUse | None:
    return AdapterUse(f"{number:032x}", str(number), num_bytes) if number else None


class SimLoader:
    """Implements `common.adapter.AdapterLoader` for one life of a worker: one task after another.

    `after(delay, handler, task)` calls back in virtual time.
    """

    wake: Callable[[], None]

    def __init__(self, adapters: Adapters, now: Callable[[], float], after: Callable[..., None]) -> None:
        self.num_slots = adapters.max_loras
        self.num_host = max(self.num_slots, adapters.max_cpu_loras or 0)
        self._read_s = adapters.num_bytes / READ_BYTES_PER_S
        self._now, self._after = now, after
        self._host: set[str] = set()
        self._results: list[AdapterResult] = []
        self._free_s = 0.0  # when the thread has nothing to do

    def submit(self, task: AdapterTask) -> None:
        self._host.difference_update(task.forgotten)
        takes_s = LOAD_S + (0.0 if task.digest in self._host else self._read_s)
        self._host.add(task.digest)
        self._free_s = max(self._now(), self._free_s) + takes_s
        self._after(self._free_s - self._now(), self._loaded, task)

    def _loaded(self, task: AdapterTask) -> None:
        self._results.append(AdapterResult(task.digest, task.slot))
        self.wake()

    def results(self) -> list[AdapterResult]:
        results, self._results = self._results, []
        return results
