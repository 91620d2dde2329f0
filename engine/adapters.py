"""A rank's adapters in host memory, and the thread that puts them into slots; the ranks of a worker as one.

rank 0   submit ──> its own thread, and a frame to every other rank
rank i   its own thread: from the file to host memory where it is not there, from there into the slot ──> a frame back
rank 0   an adapter is loaded when every rank has it; it has failed if one has not

Steps go on meanwhile: nobody computes with a slot that is being filled.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from ..common.adapter import AdapterResult, AdapterTask
from ..common.errors import KVFerryError
from .nn.adapters import AdapterSlots
from .weights.slot_matrices import AdapterWeights

if TYPE_CHECKING:
    from .engine import Engine
    from .ranks.group import RankGroup


class AdapterThread:
    """Loads for one rank. A task's answer comes on its thread."""

    def __init__(self, slots: AdapterSlots, on_result: Callable[[AdapterResult], None]) -> None:
        self._slots = slots
        self._on_result = on_result
        self._host: dict[str, AdapterWeights] = {}  # by digest
        self._tasks: queue.SimpleQueue[AdapterTask | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="adapters", daemon=True)
        self._thread.start()

    def submit(self, task: AdapterTask) -> None:
        self._tasks.put(task)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            error = ""
            try:
                with torch.inference_mode():
                    self._load(task)
            except Exception as found:  # whatever it is: its requests are told, and the thread goes on
                error = str(found) if isinstance(found, KVFerryError) else repr(found)
                self._host.pop(task.digest, None)
            self._on_result(AdapterResult(task.digest, task.slot, error[:2048]))

    def _load(self, task: AdapterTask) -> None:
        for digest in task.forgotten:
            self._host.pop(digest, None)
        self._slots.clear(task.slot)
        weights = self._host.get(task.digest)
        if weights is None:
            weights = self._host[task.digest] = self._read(task)
        self._slots.put(task.slot, weights)

    def _read(self, task: AdapterTask) -> AdapterWeights:
        digest, weights = self._slots.read(Path(task.path))
        if digest != task.digest:
            raise KVFerryError(
                f"the adapter at {task.path} has changed: its digest is {digest}, {task.digest} is asked for"
            )
        return weights

    def close(self) -> None:
        """End when what has begun is done."""
        self._tasks.put(None)


class RankAdapters:
    """Implements `common.adapter.AdapterLoader` over all ranks. Results come in from threads."""

    def __init__(self, engine: Engine, group: RankGroup | None) -> None:
        assert engine.adapters is not None
        self.num_slots = engine.config.max_loras
        self.num_host = engine.config.max_cpu_loras or self.num_slots
        self.wake: Callable[[], None] = lambda: None
        self._group = group
        self._num_ranks = engine.tp_size
        self._answers: queue.SimpleQueue[AdapterResult] = queue.SimpleQueue()
        self._under_way: dict[int, list[AdapterResult]] = {}  # by slot
        if group is not None:
            group.on_adapter = self._on_result
        self._thread = AdapterThread(engine.adapters, self._on_result)

    def submit(self, task: AdapterTask) -> None:
        self._under_way[task.slot] = []
        if self._group is not None:
            self._group.send_adapter(msgspec.msgpack.encode(task))
        self._thread.submit(task)

    def _on_result(self, result: AdapterResult) -> None:
        self._answers.put(result)
        self.wake()

    def results(self) -> list[AdapterResult]:
        ended = []
        while not self._answers.empty():
            result = self._answers.get_nowait()
            answers = self._under_way[result.slot]
            answers.append(result)
            if len(answers) == self._num_ranks:
                del self._under_way[result.slot]
                ended.append(next((answer for answer in answers if answer.error), result))
        return ended

    def close(self) -> None:
        self._thread.close()


def open_adapters(engine: Engine, group: RankGroup | None) -> RankAdapters | None:
    """Open what loads adapters; None: the engine applies none."""
    return None if engine.adapters is None else RankAdapters(engine, group)
