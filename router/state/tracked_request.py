"""A request that is not terminal, as its router tracks it: three objects of three lifetimes.

    TrackedRequest  from `submit` to the terminal state    whose fault its failures were, when it may go on
      search        from queued to a task that was sent    where it may go
      attempt       from placement to its end              who holds what of it

What the client called for, and the tokens of the answer, are in `request`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .attempt import Attempt
from .demand import Promise
from .failures import CLEARED_BY_STEPS, STRIKES_UNTIL_ALONE, Charge, Suspicion, WorkerLife
from .request import RequestStatus, RouterRequest
from .search import Search
from .token_stream import TokenStream
from .worker import RouterWorker


@dataclass(slots=True, eq=False)
class TrackedRequest:
    """One request from its admission to its end. `attempt` is None exactly while it is queued."""

    request: RouterRequest
    stream: TokenStream
    deadline_s: float | None
    event_s: float = 0.0  # when the last message about it came, or its attempt or its wait in the queue began
    attempt: Attempt | None = None
    check_at_s: float = float("inf")  # when its time limits are checked next (due_times.py)
    promise: Promise | None = None  # when its first token was expected, at its admission
    is_charged: bool = False  # its tenant was: it has left the queue for an attempt
    strikes: set[WorkerLife] = field(default_factory=set)  # workers that were lost while they computed it
    lost_with: set[WorkerLife] = field(default_factory=set)  # workers that were lost with an attempt of it
    num_extra: int = 0  # failures that it may have more than usual: the fleet loses workers without it, too
    is_resuming: bool = False  # its stream has paused: tokens came, and the worker was lost
    charge: Charge | None = None  # for the retry that comes or runs
    suspicion: Suspicion | None = None  # of what its last attempt may do yet
    not_before_s: float = 0.0  # the next attempt is put off until then
    is_suspended: bool = False  # it has made way for others, and waits in the queue until it is told to go on
    last_reason: str = ""  # of the last failure that was charged
    num_same: int = 0  # failures in a row for that reason
    failures: dict[str, int] = field(default_factory=dict)  # what was counted towards its attempts, and how often
    ended_here: set[int] = field(default_factory=set)  # choices whose stop string was found
    search: Search = field(init=False)

    def __post_init__(self) -> None:
        self.search = Search(self.request)

    @property
    def must_run_alone(self) -> bool:
        """True once it was in the running step of two workers when they were lost."""
        return len(self.strikes) >= STRIKES_UNTIL_ALONE

    def note_step(self, attempt: Attempt) -> bool:
        """Note that its attempt brought tokens, and return whether that clears it of its strikes."""
        attempt.num_steps += 1
        if attempt.num_steps >= CLEARED_BY_STEPS:
            self.suspicion = None
        if not self.strikes or attempt.num_steps < CLEARED_BY_STEPS:
            return False
        self.strikes.clear()
        return True

    def is_put_off(self, now_s: float) -> bool:
        """Return whether it waits for something else than room.

        That is for others to go first, the end of a pause, a token of the retry budget, or a worker that is not there.
        """
        is_unpaid = self.charge is not None and not self.charge.is_paid
        return self.is_suspended or now_s < self.not_before_s or is_unpaid or self.search.is_aside

    def begin(self, attempt: Attempt) -> None:
        assert self.attempt is None, self.request.request_id
        self.attempt = attempt
        self.event_s = attempt.placed_s

    def run_locally(self, now_s: float) -> None:
        """Let the attempt's decode worker compute the prompt."""
        assert self.attempt is not None
        if self.request.status is not RequestStatus.QUEUED:
            self.attempt.prediction = None  # it was of a handoff
        self.attempt.run_locally(now_s)
        self.search.end()

    def send_task(self, now_s: float, other: RouterWorker | None = None) -> None:
        """Hand the attempt's grant to its prefill worker, or to `other` if that one cannot."""
        assert self.attempt is not None
        self.attempt.send_task(now_s, other)
        self.search.end()

    def end_attempt(self, *, tell: bool = True) -> None:
        """End the attempt, if there is one, everywhere: what its workers hold is given back."""
        if self.attempt is not None:
            self.attempt.leave(tell=tell)
            self.attempt = None
