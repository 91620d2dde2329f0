"""The autoscaler is given settings, step times of a typical worker, and what workers hold at most."""

from __future__ import annotations

from collections.abc import Sequence

from ...common.router_config import AutoscaleConfig
from ..state.objectives import Objectives
from ..state.predictor import Predictor
from ..state.views import WorkerView
from .scale_types import AutoscalerSettings, Bounds, WorkerLimits

_TYPICAL = 16  # workers of which the middle one stands for all; more cost time at each decision


class TypicalTimes:
    """The predictor's step times of the fleet's middle worker."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._session: int | None = None

    def choose(self, workers: Sequence[WorkerView]) -> bool:
        """Choose the typical worker, and return whether any worker's steps are known."""
        known = [worker.session for worker in workers[:_TYPICAL] if self._predictor.is_known(worker.session)]
        known.sort(key=lambda session: (self._predictor.prefill_s(session, 512, 0), session))
        self._session = known[len(known) // 2] if known else None
        return self._session is not None and self.decode_step_s(1, 0) > 0 and self.prefill_s(1, 0) > 0

    def prefill_s(self, new_tokens: int, context: int) -> float:
        assert self._session is not None
        return self._predictor.prefill_s(self._session, new_tokens, context)

    def decode_step_s(self, rows: int, context: int) -> float:
        assert self._session is not None
        return self._predictor.decode_step_s(self._session, rows, context)


def settings_of(config: AutoscaleConfig, objectives: Objectives) -> AutoscalerSettings:
    return AutoscalerSettings(
        prefill=Bounds(config.prefill.at_least, config.prefill.at_most),
        decode=Bounds(config.decode.at_least, config.decode.at_most),
        total=config.max_workers,
        objectives=objectives,
        schedule=config.scale_schedule,
        spare_workers=config.spare_workers,
        target=config.scale_target,
        shrink_after_s=config.scale_down_after,
        flip_after_s=config.role_change_after,
    )


def worker_limits(ready: Sequence[WorkerView]) -> WorkerLimits:
    hellos = [worker.hello for worker in ready]
    is_handed_over = any(worker.role == "prefill" for worker in ready)
    return WorkerLimits(
        min(hello.num_blocks * hello.spec.block_size for hello in hellos),
        min(hello.max_num_seqs for hello in hellos),
        min(hello.max_num_batched_tokens for hello in hellos),
        hellos[0].spec if is_handed_over else None,
    )
