"""The router's picture of its workers: last heartbeat, and what this router did since.

    hello ─> Worker joins ─> heartbeats, bind/release of requests ─> lost or hung: removed

A heartbeat is up to a second old, so each `Worker` corrects it with what this router bound to it or took from it
meanwhile. Policies see frozen `WorkerView`s in a `PoolView` and nothing that changes. No socket here: a `WorkerLink`
is the session to send through.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..common.messages import Message, StepTokens, WorkerHello, WorkerStatus
from .failures import Life

HEARTBEAT_LIMIT_S = 3.0  # without one for so long, a worker hangs
STEP_LIMIT_S = 3.0  # a step may take this, or five times what it should
FIRST_STEP_LIMIT_S = 60.0  # nothing is known yet, and the first step warms up
STALL_LIMIT_S = 15.0  # work waits and none runs: the worker may wait for a fence (10 s)
_SLACK = 5.0
_PREFILL_STEP_TOKENS = 16
_CROSSING_S = 0.02  # what was bound this shortly before a heartbeat came may not be in it
_PAIR_PENALTY_S = 1.0
_MAX_PAIR_PENALTY_S = 30.0


class WorkerLink(Protocol):
    """One session with one life of a worker."""

    worker_id: str
    number: int  # of the session, unique in this router

    def send(self, message: Message) -> None:
        """Queue a message; dropped if the session has ended. Never calls back."""
        ...

    def drop(self, reason: str) -> None:
        """End the session."""
        ...


@dataclass(slots=True, frozen=True)
class Load:
    """What one request puts on a worker."""

    num_tokens: int  # to prefill; 0 where the worker prefills nothing
    num_choices: int
    num_blocks: int
    at_s: float = 0.0


@dataclass(slots=True, frozen=True)
class WorkerView:
    """A worker at one moment, corrected by what the router did since the heartbeat."""

    worker_id: str
    role: str
    session: int
    hello: WorkerHello
    status: WorkerStatus | None  # None: no heartbeat yet
    status_age_s: float
    is_ready: bool  # takes new work
    num_bound: int  # requests of this router
    ahead_tokens: int  # prompt tokens bound and not computed
    unstarted_tokens: int  # of these, in prompts that have not begun
    num_running: int  # choices, waiting ones included
    num_free_blocks: int
    s_per_token: float  # of the latest step that prefilled; 0 until one was seen
    step_s: float  # of that step: a worker cuts its chunks so that none takes long
    num_others: int = 0  # choices of other routers, by the last heartbeat


@dataclass(slots=True, frozen=True)
class PoolView:
    """All workers at one moment."""

    workers: tuple[WorkerView, ...] = ()
    avoided_pairs: frozenset[tuple[int, int]] = frozenset()  # sessions whose last handoff failed
    num_queued: int = 0
    num_live: int = 0

    def ready(self, role: str) -> list[WorkerView]:
        return [worker for worker in self.workers if worker.is_ready and worker.role == role]


@dataclass(slots=True, eq=False)
class Worker:
    """One session's worker. `bind` and `release` are the dispatcher's, once each per request and attempt."""

    link: WorkerLink
    hello: WorkerHello
    joined_s: float
    status: WorkerStatus | None = None
    status_s: float = 0.0  # when the heartbeat came
    is_draining: bool = False
    stepped_s: float = 0.0  # when tokens came
    is_claimed: bool = False  # for a request that runs alone: it gets nothing else
    loads: dict[str, Load] = field(default_factory=dict)  # by request id, in the order of binding
    _tokens_at_status: int = 0
    _choices_at_status: int = 0
    _freed_blocks: int = 0  # by requests that ended since the heartbeat
    _largest_step: tuple[int, float] = (0, 0.0)  # tokens, seconds
    _prefill_step: tuple[int, float] = (0, 0.0)  # the latest one that was no mere decode step
    _progress_s: float = 0.0  # when a step last finished, or nothing was to do
    # Requests in the last two StepTokens: a step's tokens, and what was adopted between it and the next.
    _stepping: deque[frozenset[str]] = field(default_factory=lambda: deque(maxlen=2))

    @property
    def worker_id(self) -> str:
        return self.link.worker_id

    @property
    def life(self) -> Life:
        return (self.worker_id, self.hello.incarnation)

    def begin_drain(self) -> bool:
        """Nothing new goes there, and its end is nobody's failure. False: that was known."""
        is_news, self.is_draining = not self.is_draining, True
        return is_news

    @property
    def is_ready(self) -> bool:
        return self.status is not None and self.status.state == "ready" and not self.is_draining

    @property
    def is_idle(self) -> bool:
        """It holds no work of anybody, by its last heartbeat."""
        status = self.status
        return status is not None and not (status.num_running or status.num_waiting or status.num_granted_blocks)

    def bind(self, request_id: str, load: Load) -> None:
        assert request_id not in self.loads, request_id
        self.loads[request_id] = load

    def release(self, request_id: str) -> None:
        """Idempotent: the request's part on this worker is over."""
        load = self.loads.pop(request_id, None)
        if load is not None:
            self._freed_blocks += load.num_blocks

    def note_prefilled(self, request_id: str) -> None:
        """It decodes from here on: no prompt of its is waiting any more."""
        load = self.loads.get(request_id)
        if load is not None and load.num_tokens:
            self.loads[request_id] = replace(load, num_tokens=0)

    def has_only(self, request_id: str) -> bool:
        return self.loads.keys() == {request_id} and not self._num_others()

    def note_step(self, message: StepTokens, now_s: float) -> None:
        self.stepped_s = now_s
        self._stepping.append(frozenset(update.request_id for update in message.updates))

    def decodes(self, request_id: str) -> bool:
        """Its latest steps had a row of the request: a preempted or finished one is in them no more."""
        return any(request_id in step for step in self._stepping)

    def computes_prompt_of(self, request_id: str) -> bool:
        """The running step has a part of this prompt, as far as can be known: one step's tokens at most are ahead."""
        if request_id not in self.loads:
            return False
        status = self.status
        if status is not None and status.num_waiting and not status.num_running:
            return False  # none runs: the first one waits for blocks
        done = max(0, self._tokens_at_status - status.waiting_tokens) if status is not None else 0
        ahead = 0
        for other, load in self.loads.items():
            if other == request_id:
                break
            ahead += load.num_tokens
        return ahead - done < self.hello.max_num_batched_tokens

    def on_status(self, status: WorkerStatus, now_s: float) -> None:
        previous = self.status
        stepped = previous is None or status.steps != previous.steps
        if stepped and status.step_tokens >= self._largest_step[0]:
            self._largest_step = (status.step_tokens, status.step_s)
        if stepped and status.step_tokens >= _PREFILL_STEP_TOKENS:
            self._prefill_step = (status.step_tokens, status.step_s)
        if stepped or not (status.num_running or status.num_waiting):
            self._progress_s = now_s
        self.status, self.status_s = status, now_s
        self._tokens_at_status = sum(load.num_tokens for load in self.loads.values())
        self._choices_at_status = sum(load.num_choices for load in self.loads.values())
        self._freed_blocks = 0

    def silent_s(self, now_s: float) -> float:
        """Since the last heartbeat."""
        return now_s - (self.status_s if self.status is not None else self.joined_s)

    def hang(self, now_s: float) -> str | None:
        """Why this worker counts as hung, or None."""
        status = self.status
        if self.silent_s(now_s) > HEARTBEAT_LIMIT_S:
            return f"no heartbeat for {self.silent_s(now_s):.1f} s"
        if status is None or status.state == "starting":
            return None
        limit_s = self._step_limit_s()
        if status.busy_for_s > limit_s:
            return f"a step runs for {status.busy_for_s:.1f} s, the limit is {limit_s:.1f} s"
        if not status.num_running:
            limit_s = max(limit_s, STALL_LIMIT_S)
        stalled_s = now_s - self._progress_s
        if (status.num_running or status.num_waiting) and stalled_s > limit_s:
            return f"work waits and no step has finished for {stalled_s:.1f} s, the limit is {limit_s:.1f} s"
        return None

    def _step_limit_s(self) -> float:
        tokens, step_s = self._largest_step
        if not tokens:
            return FIRST_STEP_LIMIT_S
        full_step_s = step_s * max(1.0, self.hello.max_num_batched_tokens / tokens)
        return max(STEP_LIMIT_S, _SLACK * full_step_s)

    def view(self, now_s: float) -> WorkerView:
        tokens, step_s = self._prefill_step
        return WorkerView(
            worker_id=self.worker_id,
            role=self.hello.role,
            session=self.link.number,
            hello=self.hello,
            status=self.status,
            status_age_s=self.silent_s(now_s),
            is_ready=self.is_ready,
            num_bound=len(self.loads),
            ahead_tokens=self._ahead_tokens(),
            unstarted_tokens=self._unstarted_tokens(),
            num_running=self._num_running(),
            num_free_blocks=self._num_free_blocks(),
            s_per_token=step_s / tokens if tokens else 0.0,
            step_s=step_s,
            num_others=self._num_others(),
        )

    def _recent(self) -> Iterable[Load]:
        """What the heartbeat cannot know of yet."""
        return (load for load in self.loads.values() if load.at_s > self.status_s - _CROSSING_S)

    def _ahead_tokens(self) -> int:
        waiting = self.status.waiting_tokens if self.status is not None else 0
        others = max(0, waiting - self._tokens_at_status)  # another router's
        own = sum(load.num_tokens for load in self.loads.values())
        # Ours are at most what the heartbeat saw and what came since; a prompt that is done is off `own` at once.
        return others + min(own, waiting - others + sum(load.num_tokens for load in self._recent()))

    def _unstarted_tokens(self) -> int:
        started = self.status.num_running if self.status is not None else 0
        if self.status is not None and self.status.waiting_tokens > self._tokens_at_status:
            started = 0  # those that run may be another router's
        return sum(load.num_tokens for load in list(self.loads.values())[started:])

    def _num_others(self) -> int:
        status = self.status
        running = status.num_running + status.num_waiting if status is not None else 0
        return max(0, running - self._choices_at_status)

    def _num_running(self) -> int:
        return self._num_others() + sum(load.num_choices for load in self.loads.values())

    def _num_free_blocks(self) -> int:
        free = self.status.num_free_blocks if self.status is not None else 0
        free += self._freed_blocks - sum(load.num_blocks for load in self._recent())
        return max(0, min(free, self.hello.num_blocks))


@dataclass(slots=True)
class _PairFailure:
    penalty_s: float
    until_s: float


class Pools:
    """All sessions, and which pairs of them fail at handoffs."""

    def __init__(self) -> None:
        self._workers: dict[int, Worker] = {}  # by session number
        self._pairs: dict[tuple[int, int], _PairFailure] = {}

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._workers.values()))

    def join(self, link: WorkerLink, hello: WorkerHello, now_s: float) -> Worker:
        worker = Worker(link, hello, now_s)
        self._workers[link.number] = worker
        return worker

    def leave(self, link: WorkerLink) -> Worker | None:
        worker = self._workers.pop(link.number, None)
        self._pairs = {pair: state for pair, state in self._pairs.items() if link.number not in pair}
        return worker

    def find(self, link: WorkerLink) -> Worker | None:
        return self._workers.get(link.number)

    def named(self, worker_id: str) -> Worker | None:
        return next((worker for worker in self._workers.values() if worker.worker_id == worker_id), None)

    def with_role(self, role: str) -> list[Worker]:
        return [worker for worker in self._workers.values() if worker.hello.role == role]

    def has_ready(self, role: str) -> bool:
        return any(worker.is_ready for worker in self.with_role(role))

    def on_handoff(self, prefill: Worker, decode: Worker, now_s: float, *, failed: bool) -> None:
        """Remember how the pair's last handoff went: after a failure others are preferred for a while."""
        pair = (prefill.link.number, decode.link.number)
        known = self._pairs.pop(pair, None)
        if failed and self.find(prefill.link) is prefill and self.find(decode.link) is decode:
            penalty_s = min(_MAX_PAIR_PENALTY_S, known.penalty_s * 2 if known is not None else _PAIR_PENALTY_S)
            self._pairs[pair] = _PairFailure(penalty_s, now_s + penalty_s)

    def view(self, now_s: float, *, num_queued: int = 0, num_live: int = 0) -> PoolView:
        return PoolView(
            workers=tuple(worker.view(now_s) for worker in self._workers.values()),
            avoided_pairs=frozenset(pair for pair, state in self._pairs.items() if state.until_s > now_s),
            num_queued=num_queued,
            num_live=num_live,
        )
