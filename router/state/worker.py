"""One worker as its router knows it: the last heartbeat, and what this router did since.

    hello ─> heartbeats, bind and release of requests ─> a picture at any moment ─> hung: why

A heartbeat is up to a second old, so it is corrected with what was bound to the worker or taken from it meanwhile. No
socket here: a `WorkerLink` is the session to send through.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from msgspec import structs

from ...common.pacing import PROMPT_DUE_STRETCH
from ...wire.fields import Message
from ...wire.results import StepTokens
from ...wire.workers import WorkerHello, WorkerStatus
from .expert_load import ExpertLoad
from .failures import WorkerLife
from .objectives import Pace
from .step_progress import StepProgress
from .views import RequestLoad, WorkerView

HEARTBEAT_LIMIT_S = 3.0  # without one for so long, a worker hangs
_CROSSING_S = 0.02  # what was bound this shortly before a heartbeat came may not be in it


class WorkerLink(Protocol):
    """A session with one life of a worker."""

    worker_id: str
    number: int  # of the session, unique in this router

    def send(self, message: Message) -> None:
        """Queue a message; dropped if the session has ended. Never calls back."""
        ...

    def drop(self, reason: str) -> None:
        """End the session."""
        ...


@dataclass(slots=True, eq=False)
class RouterWorker:
    """A worker, as one session knows it. The dispatcher calls `bind` and `release`, once each per attempt."""

    link: WorkerLink
    hello: WorkerHello
    joined_s: float
    status: WorkerStatus | None = None
    status_s: float = 0.0  # when the heartbeat came
    expert_load: ExpertLoad | None = None  # None: it has told none
    is_draining: bool = False
    has_said_goodbye: bool = False  # the end of its session is no loss
    forgiven_s: float = float("-inf")  # before that, its silence proves nothing
    stepped_s: float = 0.0  # when tokens came
    stuck_step: int | None = None  # the step that it was given up for: it takes nothing while that runs
    is_claimed: bool = False  # for a request that runs alone: it gets nothing else
    loads: dict[str, RequestLoad] = field(default_factory=dict)  # by request id, in the order of binding
    on_change: Callable[[RouterWorker], None] = field(default=lambda worker: None, repr=False)  # its picture has
    has_refused: bool = False  # something, since the last heartbeat
    named_role: str = ""  # a role that it has told before a heartbeat did
    # Of the loads, kept as they come and go: a view must not cost what a worker holds.
    _own_tokens: int = 0
    _own_choices: int = 0
    _paces: Counter[Pace] = field(default_factory=Counter)
    _recent: dict[str, RequestLoad] = field(default_factory=dict)  # bound since the heartbeat
    _arriving: dict[str, int] = field(default_factory=dict)  # context of requests that do not decode yet
    _arrived: set[str] = field(default_factory=set)  # of `_arriving`: the ones that the next heartbeat counts
    _tokens_at_status: int = 0
    _choices_at_status: int = 0
    _freed_blocks: int = 0  # by requests that ended since the heartbeat
    _steps: StepProgress = field(default_factory=StepProgress)
    # Of `loads`, those in the last two StepTokens with all their parts: a step's, and what was adopted before the next.
    _stepping: deque[frozenset[str]] = field(default_factory=lambda: deque(maxlen=2))

    @property
    def worker_id(self) -> str:
        return self.link.worker_id

    @property
    def role(self) -> str:
        """Return its active role."""
        return self.named_role or self.hello.role

    def set_role(self, role: str) -> None:
        """Note its active role, in whatever message it named it."""
        if role and role != self.role:
            self.named_role = role
            self.on_change(self)

    @property
    def life(self) -> WorkerLife:
        return (self.worker_id, self.hello.incarnation)

    def begin_drain(self) -> bool:
        """Nothing new goes there. False: that was known."""
        is_news, self.is_draining = not self.is_draining, True
        self.on_change(self)
        return is_news

    @property
    def is_ready(self) -> bool:
        return self.status is not None and self.status.state == "ready" and not self.is_draining

    @property
    def is_idle(self) -> bool:
        """True if it holds no work of anybody, by its last heartbeat."""
        status = self.status
        return status is not None and not (status.num_running or status.num_waiting or status.num_granted_blocks)

    def bind(self, request_id: str, load: RequestLoad) -> None:
        assert request_id not in self.loads, request_id
        self.loads[request_id] = self._recent[request_id] = load
        self._own_tokens += load.num_tokens
        self._own_choices += load.num_choices
        if load.context:
            self._arriving[request_id] = load.context
        if load.pace is not None:
            self._paces[load.pace] += 1
        self.on_change(self)

    def release(self, request_id: str) -> None:
        """Take the request's load off: its part on this worker has ended. Idempotent."""
        load = self.loads.pop(request_id, None)
        if load is not None:
            if self._recent.pop(request_id, None) is None:  # else the heartbeat counts its blocks as free
                self._freed_blocks += load.num_blocks
            self._own_tokens -= load.num_tokens
            self._own_choices -= load.num_choices
            self._arriving.pop(request_id, None)
            self._arrived.discard(request_id)
            if load.pace is not None:
                self._paces -= Counter((load.pace,))  # those that nobody keeps any more are gone
            self.on_change(self)

    def note_prefilled(self, request_id: str) -> None:
        """Note that the request decodes from here on: no prompt of its is waiting any more."""
        load = self.loads.get(request_id)
        if load is None:
            return
        self._arrived.add(request_id)
        if load.num_tokens:
            self.loads[request_id] = replace(load, num_tokens=0, work_s=0.0)
            self._own_tokens -= load.num_tokens
            if request_id in self._recent:
                self._recent[request_id] = self.loads[request_id]
            self.on_change(self)

    def has_only(self, request_id: str) -> bool:
        return self.loads.keys() == {request_id} and not self._num_others()

    def note_step(self, message: StepTokens, now_s: float) -> None:
        self.stepped_s = now_s
        before = self._stepping.pop() if message.is_rest and self._stepping else frozenset[str]()
        self._stepping.append(before.union({update.request_id for update in message.updates} & self.loads.keys()))

    def has_stepped_since(self, at_s: float) -> bool:
        """Return whether it is known to run another step now than at that time, or none."""
        status = self.status
        return self.stepped_s > at_s or (status is not None and self.status_s - status.busy_for_s > at_s)

    def decodes(self, request_id: str) -> bool:
        """Return whether its latest steps had a row of the request: a preempted or finished one is in them no more."""
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
        if self.stuck_step is not None and status.busy_for_s and status.steps == self.stuck_step:
            status = structs.replace(status, state="starting")
        else:
            self.stuck_step = None
        self._steps.on_status(self.status, status, now_s)
        self.status, self.status_s = status, now_s
        if status.experts:
            self.expert_load = ExpertLoad.after(self.expert_load, status.experts)
        self.set_role(status.role)
        for name in self._arrived:  # what decodes by now is in the heartbeat's own count
            self._arriving.pop(name, None)
        self._arrived.clear()
        if self._recent:
            self._recent = {name: load for name, load in self._recent.items() if load.at_s > now_s - _CROSSING_S}
        self._tokens_at_status, self._choices_at_status = self._own_tokens, self._own_choices
        self._freed_blocks = 0
        self.on_change(self)

    def silent_s(self, now_s: float) -> float:
        """Return the seconds since the last heartbeat."""
        return now_s - (self.status_s if self.status is not None else self.joined_s)

    def hang(self, now_s: float) -> str | None:
        """Return why this worker counts as hung, or None."""
        if min(self.silent_s(now_s), now_s - self.forgiven_s) > HEARTBEAT_LIMIT_S:
            return f"no heartbeat for {self.silent_s(now_s):.1f} s"
        if self.status is None or self.status.state == "starting":
            return None
        return self._steps.hang(self.status, self.status_s, now_s, self.hello.max_num_batched_tokens)

    def forgive_silence(self, now_s: float) -> None:
        """Wait for its next heartbeat, and for the end of its step, as if both were missed from now on."""
        self.forgiven_s = now_s
        self._steps.forgive(now_s)

    def view(self, now_s: float) -> WorkerView:
        ahead_tokens, s_per_token = self._ahead_tokens(), self._steps.s_per_token
        backlog_s, line = self._backlog_s(ahead_tokens, s_per_token)
        return WorkerView(
            worker_id=self.worker_id,
            role=self.role,
            session=self.link.number,
            hello=self.hello,
            status=self.status,
            status_age_s=self.silent_s(now_s),
            is_ready=self.is_ready,
            num_bound=len(self.loads),
            ahead_tokens=ahead_tokens,
            unstarted_tokens=self._unstarted_tokens(),
            num_running=self._num_running(),
            num_free_blocks=self._num_free_blocks(),
            s_per_token=s_per_token,
            step_s=self._steps.prefill_step_s,
            num_others=self._num_others(),
            backlog_s=backlog_s,
            line=line,
            context=self._context(),
            expert_load=self.expert_load,
            paces=tuple(self._paces),
        )

    def _backlog_s(self, ahead_tokens: int, s_per_token: float) -> tuple[float, tuple[tuple[float, float], ...]]:
        """Own prompts as predicted, by the share of their tokens that is left, in the order in which the worker serves
        them; others' at the latest step's speed."""
        own = self._own_tokens
        if not own:
            return ahead_tokens * s_per_token, ()
        left = min(ahead_tokens, own)
        line = sorted(
            (load.at_s + PROMPT_DUE_STRETCH * load.work_s, load.work_s)
            for load in self.loads.values()
            if load.num_tokens
        )
        done_s = sum(work_s for _, work_s in line) * (1 - left / own)
        waiting = []
        for due_s, work_s in line:
            if work_s > done_s:
                waiting.append((due_s, work_s - done_s))
            done_s = max(0.0, done_s - work_s)
        return sum(left_s for _, left_s in waiting) + (ahead_tokens - left) * s_per_token, tuple(waiting)

    def _context(self) -> int:
        running = self.status.decode_context if self.status is not None else 0
        return running + sum(self._arriving.values())

    def _ahead_tokens(self) -> int:
        waiting = self.status.waiting_tokens if self.status is not None else 0
        others = max(0, waiting - self._tokens_at_status)  # another router's
        # Ours are at most what the heartbeat saw and what came since; a prompt that is done is off `own` at once.
        recent = sum(load.num_tokens for load in self._recent.values())
        return others + min(self._own_tokens, waiting - others + recent)

    def _unstarted_tokens(self) -> int:
        if not self._own_tokens:
            return 0
        started = self.status.num_running if self.status is not None else 0
        if self.status is not None and self.status.waiting_tokens > self._tokens_at_status:
            started = 0  # those that run may be another router's
        return sum(load.num_tokens for load in list(self.loads.values())[started:])

    def _num_others(self) -> int:
        status = self.status
        running = status.num_running + status.num_waiting if status is not None else 0
        return max(0, running - self._choices_at_status)

    def _num_running(self) -> int:
        return self._num_others() + self._own_choices

    def _num_free_blocks(self) -> int:
        free = self.status.num_free_blocks if self.status is not None else 0
        if self.status is not None and self.status.share < 1.0:  # the rest is for requests of other routers
            free = int(free * self.status.share)
        free += self._freed_blocks - sum(load.num_blocks for load in self._recent.values())
        return max(0, min(free, self.hello.num_blocks))
