"""The workers as the autoscaler counts them: those that are connected here, and those that the launcher is starting.

    launcher's word ─> planned ─(connects, ready)─> READY ─(told to end, or ends by itself)─> DRAINING
                       PENDING <─(a step hangs)──────┤
                                                     └─ of its new pool from the moment that it is given a role

Without a launcher those that are connected are all.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...common.errors import ConfigError
from ..state.views import PoolView, WorkerView
from .scale_types import Member, MemberState, Pool

_OBEY_S = 5.0  # for a worker to take on a new role, meanwhile it counts as of it; shorter may flip another too


class FleetMembers:
    """`FleetMembers` holds the launcher's last word about the fleet, and what was learned of its workers."""

    def __init__(self) -> None:
        self.seq = -1  # of the last request that the launcher answered
        self.start_s: float | None = None  # as measured, from the request for a worker until it takes work
        self._planned: dict[str, Pool] = {}  # that should be there, by the pool they began in
        self._leaving: frozenset[str] = frozenset()
        self._given: dict[str, tuple[Pool, float]] = {}  # roles that workers were given a moment ago, until when
        self._first_seen: dict[str, float] | None = None  # workers that start; -1: they have; None: no word came yet

    def __contains__(self, worker_id: str) -> bool:
        """Say whether the launcher means this worker to be there."""
        return worker_id in self._planned

    @property
    def is_told(self) -> bool:
        """Say whether a word of the launcher's came."""
        return self._first_seen is not None

    def on_launcher(self, event: Mapping[str, object], now_s: float) -> None:
        """Take the launcher's word about the fleet."""
        workers, leaving, seq = event.get("workers"), event.get("leaving"), event.get("seq")
        self._planned = {str(name): _pool(role) for name, role in workers.items()} if isinstance(workers, dict) else {}
        self._leaving = frozenset(map(str, leaving)) if isinstance(leaving, list) else frozenset()
        # The first word names workers of any age: they serve already, or the router comes later.
        began_s = -1.0 if self._first_seen is None else now_s
        self.seq = seq if isinstance(seq, int) else -1
        known = self._first_seen or {}
        self._first_seen = {name: known.get(name, began_s) for name in self._planned}

    def give_role(self, worker_id: str, pool: Pool, now_s: float) -> None:
        """Count a worker in this pool until it has had time to say so itself."""
        self._given[worker_id] = (pool, now_s + _OBEY_S)

    def members(self, view: PoolView, now_s: float) -> list[Member]:
        self._given = {name: given for name, given in self._given.items() if given[1] > now_s}
        known = {worker.worker_id: worker for worker in view.workers}
        members = [self._member(worker) for worker in known.values()]
        members += [
            Member(name, pool, MemberState.PENDING) for name, pool in self._planned.items() if name not in known
        ]
        return members

    def _member(self, worker: WorkerView) -> Member:
        pool = self._given[worker.worker_id][0] if worker.worker_id in self._given else _pool(worker.role)
        is_starting = worker.status is None or worker.status.state == "starting"
        if worker.worker_id in self._leaving or not (worker.is_ready or is_starting):
            state = MemberState.DRAINING
        else:
            state = MemberState.READY if worker.is_ready else MemberState.PENDING
        load = worker.num_running + worker.num_bound + worker.ahead_tokens / max(1, worker.hello.max_num_batched_tokens)
        return Member(worker.worker_id, pool, state, load, worker.hello.can_change_role)

    def measure_starts(self, view: PoolView, now_s: float) -> None:
        """Measure how long new workers take, from the launcher's word until they are ready here.

        Called in every router: one that decides later would take the time until then for a start.
        """
        first_seen = self._first_seen or {}
        for worker in view.workers:
            began_s = first_seen.get(worker.worker_id)
            if worker.is_ready and began_s is not None and began_s >= 0:
                took_s = now_s - began_s
                self.start_s = took_s if self.start_s is None else 0.5 * (self.start_s + took_s)
                first_seen[worker.worker_id] = -1.0


def _pool(role: object) -> Pool:
    if role != "prefill" and role != "decode":
        raise ConfigError(f"{role!r} is no pool")
    return role
