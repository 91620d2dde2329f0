"""Each worker in turn, whatever it has to do: the next one of each pool that has room. A baseline."""

from __future__ import annotations

from itertools import count

from ..state.demand import Demand, Placement
from ..state.views import WorkerView
from .least_loaded import Key, LeastLoaded


class RoundRobin(LeastLoaded):
    """The policy that takes the workers that were taken longest ago."""

    name = "round_robin"

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]  # the base class names and checks them
        self._turns = count(1)
        self._taken: dict[str, int] = {}

    def prefill_key(self, worker: WorkerView, demand: Demand) -> Key:
        return (self._taken.get(worker.worker_id, 0), worker.worker_id)

    def decode_key(self, worker: WorkerView, demand: Demand) -> Key:
        return (self._taken.get(worker.worker_id, 0), worker.worker_id)

    def on_placed(self, placement: Placement) -> None:
        turn = next(self._turns)
        for worker_id in (placement.prefill_worker, placement.decode_worker):
            if worker_id is not None:
                self._taken[worker_id] = turn
