"""The workers that a deployment has at the moment: their plans, fresh ids, what of the host they take.

    templates ─(add)─> plan: an id of its own, free GPUs, a place on the core board ─(leave)─> ─(forget)─> free again

An id is never given twice, so nothing old is taken for something new. Pure: who starts and ends them is the launcher's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..common.cores import CoreBoard
from .plan import Deployment, WorkerPlan


class Fleet:
    """The workers that should be there, and those that are leaving."""

    def __init__(self, deployment: Deployment, board: CoreBoard | None = None) -> None:
        """`board`: the cores that workers on this machine share, places for twice as many as there may be."""
        self._templates: dict[str, WorkerPlan] = {worker.config.role: worker for worker in deployment.templates}
        self._gpus = deployment.gpus
        self._max_workers = deployment.max_workers
        self._board = board
        self._plans: dict[str, WorkerPlan] = {}
        self._leaving: set[str] = set()
        self._places: dict[str, int] = {}  # on the core board
        self._num_given: dict[str, int] = {}  # ids, by role
        for worker in deployment.workers:
            role = worker.config.role
            self._num_given[role] = self._num_given.get(role, 0) + 1
            self._keep(worker)

    def __len__(self) -> int:
        """Count the workers, without those that leave."""
        return len(self._plans) - len(self._leaving)

    @property
    def plans(self) -> tuple[WorkerPlan, ...]:
        return tuple(self._plans.values())

    @property
    def roles(self) -> Mapping[str, str]:
        """The pool that each began in, of those that stay."""
        return {name: plan.config.role for name, plan in self._plans.items() if name not in self._leaving}

    @property
    def leaving(self) -> tuple[str, ...]:
        return tuple(sorted(self._leaving))

    def add(self, role: str) -> WorkerPlan | None:
        """One more worker of this pool; None where the deployment's bound or the host has no room for it."""
        template = self._templates.get(role)
        if template is None or len(self) >= self._max_workers or len(self._plans) >= 2 * self._max_workers:
            return None
        gpus: tuple[str, ...] = ()
        if self._gpus:
            free = self._free_gpus()
            if len(free) < template.num_ranks:
                return None
            gpus = free[: template.num_ranks]
        number = self._num_given.get(role, 0)
        self._num_given[role] = number + 1
        config = template.config.model_copy(update={"worker_id": f"{template.config.worker_id}-{number}"})
        return self._keep(replace(template, config=config, gpus=gpus))

    def leave(self, worker_id: str) -> bool:
        """Mark a worker as one that is to go. False: it is not here, or it was told already."""
        if worker_id not in self._plans or worker_id in self._leaving:
            return False
        self._leaving.add(worker_id)
        return True

    def forget(self, worker_id: str) -> None:
        """Free what the worker took: nothing of it is left. Idempotent."""
        self._plans.pop(worker_id, None)
        self._places.pop(worker_id, None)
        self._leaving.discard(worker_id)

    def _free_gpus(self) -> tuple[str, ...]:
        taken = {gpu for plan in self._plans.values() for gpu in plan.gpus}
        return tuple(gpu for gpu in self._gpus if gpu not in taken)

    def _keep(self, plan: WorkerPlan) -> WorkerPlan:
        name = plan.config.worker_id
        if self._board is not None and plan.max_threads is not None:
            taken = set(self._places.values())
            place = self._places[name] = next(n for n in range(self._board.num_slots) if n not in taken)
            cores = self._board.slot(place, plan.max_threads)
            plan = replace(plan, config=plan.config.model_copy(update={"cores": cores}))
        self._plans[name] = plan
        return plan
