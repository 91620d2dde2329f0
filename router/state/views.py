"""Policies see workers as frozen pictures, which are made anew when something about a worker has changed.

A `PoolView` costs nothing to make: it shows the pictures that `Pools` keeps. `nearest` is how a policy looks at a
thousand workers without looking at each: the few that would serve a request soonest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...common.kv_spec import growth_blocks
from ...wire.workers import WorkerHello, WorkerStatus
from .expert_load import ExpertLoad
from .objectives import Pace

Rank = tuple[float, int, int, int]


@dataclass(slots=True, frozen=True)
class RequestLoad:
    """The load that one request puts on a worker."""

    num_tokens: int  # to prefill, cached ones included; 0 where the worker prefills nothing
    num_choices: int
    num_blocks: int
    at_s: float = 0.0
    work_s: float = 0.0  # predicted, to prefill what is not cached
    context: int = 0  # tokens that a decode worker's row attends to at its start
    pace: Pace | None = None  # of its stream; None: it has no objective, or streams nothing


@dataclass(slots=True, frozen=True)
class WorkerView:
    """A worker at one moment, corrected by what the router did since the heartbeat."""

    worker_id: str
    role: str  # its active one
    session: int
    hello: WorkerHello
    status: WorkerStatus | None  # None: no heartbeat yet
    status_age_s: float
    is_ready: bool  # takes new work
    num_bound: int  # requests of this router
    ahead_tokens: int  # prompt tokens bound and not computed
    unstarted_tokens: int  # of `ahead_tokens`: in prompts that have not begun
    num_running: int  # choices, waiting ones included
    num_free_blocks: int  # for this router
    s_per_token: float  # of the latest step that prefilled; 0 until one was seen
    step_s: float  # of the latest step that prefilled: a worker cuts its chunks so that none takes long
    num_others: int = 0  # choices of other routers, by the last heartbeat
    backlog_s: float = 0.0  # predicted time to compute what is ahead
    line: tuple[tuple[float, float], ...] = ()  # of `backlog_s`, by prompt in order: (due time, seconds left)
    context: int = 0  # tokens that a decode step attends to, those on their way included
    expert_load: ExpertLoad | None = None
    paces: tuple[Pace, ...] = ()  # of this router's streams there, each once

    def wait_s(self, due_s: float) -> float:
        """Return the wait for prompts served before one that is due then; others' are, as far as is known."""
        before_s = sum(left_s for due, left_s in self.line if due <= due_s)
        unknown_s = self.backlog_s - sum(left_s for _, left_s in self.line)
        is_stepping = self.backlog_s > before_s + unknown_s
        return before_s + max(0.0, unknown_s) + (self.step_s / 2 if is_stepping else 0.0)

    @property
    def prefill_rank(self) -> Rank:
        """The first in this order is done with its prompts soonest."""
        return (self.backlog_s, self.ahead_tokens, self.num_bound, self.session)

    @property
    def decode_rank(self) -> Rank:
        """The first in this order has the shortest steps, as far as one number can tell."""
        return (self.num_running, self.ahead_tokens, -self.num_free_blocks, self.session)


@dataclass(slots=True)
class PoolView:
    """All workers at one moment. Lists may be used until the next change of the pools."""

    workers: Sequence[WorkerView] = ()
    avoided_pairs: frozenset[tuple[int, int]] = frozenset()  # sessions whose last handoff failed
    num_queued: int = 0
    num_in_flight: int = 0
    now_s: float = 0.0
    block_size: int = 0  # of all workers, tokens; 0: none has joined yet
    queued_by_class: Mapping[str, int] = field(default_factory=dict)
    _most_room: int | None = field(init=False, repr=False, compare=False, default=None)
    _order: dict[str, list[Rank]] = field(init=False, repr=False, compare=False, default_factory=dict)
    _by_session: Mapping[int, WorkerView] = field(init=False, repr=False, compare=False, default_factory=dict)

    def show(self, order: dict[str, list[Rank]], by_session: Mapping[int, WorkerView]) -> None:
        """Take over what `Pools` has worked out: the ready workers of each role in order of rank."""
        self._order, self._by_session = order, by_session

    def ready(self, role: str) -> list[WorkerView]:
        """Return the ready workers in order of rank."""
        return [self._by_session[rank[-1]] for rank in self._ranks(role)]

    def num_ready(self, role: str) -> int:
        return len(self._ranks(role))

    def find(self, session: int) -> WorkerView | None:
        if not self._by_session and self.workers:
            self._by_session = {worker.session: worker for worker in self.workers}
        return self._by_session.get(session)

    def nearest(self, role: str, count: int, also: Iterable[int] = ()) -> list[WorkerView]:
        """Ready workers of a role: the first `count` by rank, and those of `also` (sessions)."""
        ranks = self._ranks(role)
        sessions = [rank[-1] for rank in ranks[:count]]
        if len(ranks) > count:
            sessions += [session for session in also if session not in sessions and self._is_ready(session, role)]
        return [self._by_session[session] for session in sessions]

    @property
    def most_room(self) -> int:
        """The most blocks that a ready decode worker with a row to spare has, beside its rows' growth."""
        if self._most_room is None:
            with_rows = (one for one in self.ready("decode") if one.num_running < one.hello.max_num_seqs)
            self._most_room = max(
                (one.num_free_blocks - growth_blocks(one.num_running, one.hello.spec.block_size) for one in with_rows),
                default=0,
            )
        return self._most_room

    def _is_ready(self, session: int, role: str) -> bool:
        worker = self._by_session.get(session)
        return worker is not None and worker.is_ready and worker.role == role

    def _ranks(self, role: str) -> list[Rank]:
        found = self._order.get(role)
        if found is None:
            ready = [worker for worker in self.workers if worker.is_ready and worker.role == role]
            self._by_session = {worker.session: worker for worker in self.workers}
            found = self._order[role] = sorted(RANKS[role](worker) for worker in ready)
        return found


def has_gained(before: WorkerView, now: WorkerView) -> bool:
    """Return whether the worker may take a request now that it could not take before.

    Progress alone is no gain: a thousand workers that compute would else have the queue walked ten thousand times a
    second.
    """
    if before.role != now.role or before.is_ready != now.is_ready or before.status is None:
        return True
    budget = now.hello.max_num_batched_tokens
    if now.ahead_tokens <= budget < before.ahead_tokens or now.unstarted_tokens < before.unstarted_tokens:
        return True
    return (
        now.num_free_blocks > before.num_free_blocks
        or now.num_running < before.num_running
        or now.num_others != before.num_others
    )


def _prefill_rank(worker: WorkerView) -> Rank:
    return worker.prefill_rank


def _decode_rank(worker: WorkerView) -> Rank:
    return worker.decode_rank


RANKS = {"prefill": _prefill_rank, "decode": _decode_rank}
