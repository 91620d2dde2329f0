"""A router (`kvferry.router`) that leaves the choice of workers to its test: a file names those that it may take.

p-0 d-0     a prefill and a decode worker: prompts are handed over
d-0         a decode worker alone: it computes them itself, as in a deployment without prefill workers
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kvferry.common.router_config import RouterConfig
from kvferry.router import assembly
from kvferry.router.placement.least_loaded import LeastLoaded
from kvferry.router.process import main
from kvferry.router.state.demand import Demand, Placement, Wait
from kvferry.router.state.predictor import Predictor
from kvferry.router.state.views import PoolView, WorkerView

PIN_VARIABLE = "PINNED_WORKERS"  # the file


class Pinned:
    """Sees no other worker than those that are named now."""

    name = "pinned"
    predicts = False

    def __init__(self, file: Path) -> None:
        self._file = file
        self._handing_over = LeastLoaded(local_prefill=False)
        self._colocated = LeastLoaded(expect_prefill=False)

    def _named(self, view: PoolView) -> PoolView:
        names = self._file.read_text().split()
        return PoolView([worker for worker in view.workers if worker.worker_id in names], view.avoided_pairs)

    def place(self, view: PoolView, demand: Demand) -> Placement | Wait:
        named = self._named(view)
        is_pair = any(worker.role == "prefill" for worker in named.workers)
        return (self._handing_over if is_pair else self._colocated).place(named, demand)

    def prefill_for(self, view: PoolView, demand: Demand, decode_session: int) -> WorkerView | None:
        return self._handing_over.prefill_for(self._named(view), demand, decode_session)


def _make_policy(config: RouterConfig, predictor: Predictor) -> Pinned:
    return Pinned(Path(os.environ[PIN_VARIABLE]))


if __name__ == "__main__":
    assembly.make_policy = _make_policy  # type: ignore[attr-defined]  # this process is the pinned one
    sys.exit(main())
