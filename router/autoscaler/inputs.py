"""The autoscaler is given settings, step times of a typical worker of each pool, and what workers hold at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...common.router_config import AutoscaleConfig
from ..state.objectives import Objectives
from ..state.predictor import Predictor
from ..state.views import WorkerView
from .scale_types import POOLS, AutoscalerSettings, Bounds, Pool, WorkerLimits

_TYPICAL = 16  # workers of which the middle one stands for its pool; more cost time at each decision


class TypicalTimes:
    """The predictor's step times of each pool's middle worker: pools may have settings of their own."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._prefill: int | None = None  # sessions
        self._decode: int | None = None

    def choose(self, workers: Sequence[WorkerView]) -> bool:
        """Choose the typical workers, and return whether the steps of both kinds are known."""
        self._prefill = _middle(workers, "prefill", lambda session: self._predictor.prefill_s(session, 512, 0))
        self._decode = _middle(workers, "decode", lambda session: self._predictor.decode_step_s(session, 1, 0))
        return self._prefill is not None and self._decode is not None

    def prefill_s(self, new_tokens: int, context: int) -> float:
        assert self._prefill is not None
        return self._predictor.prefill_s(self._prefill, new_tokens, context)

    def decode_step_s(self, rows: int, context: int) -> float:
        assert self._decode is not None
        return self._predictor.decode_step_s(self._decode, rows, context)


def _middle(workers: Sequence[WorkerView], pool: Pool, step_s: Callable[[int], float]) -> int | None:
    """Return the session of the middle one, by a step's time, of the pool's workers whose steps are known."""
    known = [worker for worker in workers if step_s(worker.session) > 0]
    typical = (_of_pool(known, pool) or _taking_work(known))[:_TYPICAL]
    by_time = sorted((step_s(worker.session), worker.session) for worker in typical)
    return by_time[len(by_time) // 2][1] if by_time else None


class TypicalLimits:
    """Tells what workers of each pool hold at most, by those that are there, else by the last that were."""

    def __init__(self) -> None:
        self._seen: dict[Pool, list[WorkerView]] = {}  # last

    def of(self, workers: Sequence[WorkerView]) -> WorkerLimits | None:
        """Return the limits, of a pool that never had workers by the other one's; None: nobody was ever there."""
        for pool in POOLS:
            if own := _of_pool(workers, pool):
                self._seen[pool] = own
        if not self._seen:
            return None
        any_of = next(iter(self._seen.values()))
        prefills, decodes = ([worker.hello for worker in self._seen.get(pool, any_of)] for pool in POOLS)
        is_handed_over = any(worker.role == "prefill" for worker in workers)
        return WorkerLimits(
            min(hello.num_blocks * hello.spec.block_size for hello in decodes),
            min(hello.max_num_seqs for hello in decodes),
            min(hello.max_num_batched_tokens for hello in prefills),
            decodes[0].spec if is_handed_over else None,
        )


def _of_pool(workers: Sequence[WorkerView], pool: Pool) -> list[WorkerView]:
    return _taking_work([worker for worker in workers if worker.role == pool])


def _taking_work(workers: Sequence[WorkerView]) -> list[WorkerView]:
    """Return those that take work; all where none does, as who drains is no slower and holds no less."""
    return [worker for worker in workers if worker.is_ready] or list(workers)


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
