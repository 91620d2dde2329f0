"""Adapters without matrices: a slot holds a digest, and nothing while it is filled.

The tags of a request depend on its adapter (`oracle.py`), so keys and values of another one, or of what the same name
stood for before, are wrong for whoever reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry.common.adapter import NO_ADAPTER, AdapterResult, AdapterTask
from kvferry.common.request import Sequence
from kvferry.router.state.adapter_use import AdapterUse

from .breach import Breach

if TYPE_CHECKING:
    from .workers import Worker

NUM_NAMES = 4
_MAX_READ_S = 0.1  # some steps: requests overtake those whose adapter is not here
_COPY_S = 0.001  # from host memory


def adapter_use(number: int) -> AdapterUse | None:
    """Return what a router knows of an adapter's bytes; 0: none."""
    return AdapterUse(f"{number:08x}", f"/adapters/{number}", 1 << 20) if number else None


class SimLoader:
    """Implements `common.adapter.AdapterLoader` for one life of a worker: one task after another."""

    num_slots = 2  # fewer than names
    num_host = 3

    def __init__(self, worker: Worker) -> None:
        self.wake = worker.wake
        self._worker = worker
        self._slots: list[str] = [""] * self.num_slots
        self._host: set[str] = set()
        self._results: list[AdapterResult] = []
        self._free_s = 0.0  # when the thread has nothing to do

    def submit(self, task: AdapterTask) -> None:
        kernel, seen = self._worker.world.kernel, self._worker.world.tally.seen
        self._slots[task.slot] = ""
        self._host.difference_update(task.forgotten)
        seen["adapters forgotten"] += len(task.forgotten)
        is_here = task.digest in self._host
        seen["adapters loaded from host memory" if is_here else "adapters read"] += 1
        self._host.add(task.digest)
        takes_s = _COPY_S if is_here else kernel.random.uniform(0, _MAX_READ_S)
        self._free_s = max(kernel.now, self._free_s) + takes_s
        self._worker.process.after(self._free_s - kernel.now, self._loaded, task)

    def _loaded(self, task: AdapterTask) -> None:
        self._slots[task.slot] = task.digest
        self._results.append(AdapterResult(task.digest, task.slot))
        self.wake()

    def results(self) -> list[AdapterResult]:
        results, self._results = self._results, []
        return results

    def check(self, seq: Sequence) -> None:
        """L1: a step that begins or ends now computes the sequence with its adapter."""
        slot = seq.adapter_slot
        held = "" if slot == NO_ADAPTER else self._slots[slot]
        if held != seq.adapter:
            text = f"computes {seq.request_id} with {held or 'nothing'} in slot {slot}, not {seq.adapter or 'nothing'}"
            raise Breach("L1", f"{self._worker.place} {text}")
